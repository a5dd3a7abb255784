#include "virtio/vsock_connection.hpp"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>

namespace polyvisor::virtio {

namespace {

constexpr u32 kHeader = sizeof(VsockHeader);
// Linux takes no larger packets (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
constexpr u32 kMostPayload = 64 << 10;

/// [offset, offset + size) of the buffers as an iovec; what does not fit into it is left out.
struct Pieces {
    Pieces(std::span<const Buffer> buffers, u32 offset, u32 size) {
        for (const Buffer& buffer : buffers) {
            if (size == 0 || count == list.size()) break;
            if (offset >= buffer.size) {
                offset -= buffer.size;
                continue;
            }
            const u32 here = std::min(buffer.size - offset, size);
            list[count++] = {buffer.data + offset, here};
            size -= here;
            offset = 0;
        }
        message.msg_iov = list.data();
        message.msg_iovlen = count;
    }
    std::array<iovec, 64> list;
    std::size_t count = 0;
    msghdr message{};
};

bool would_block(int error) {
    return error == EAGAIN || error == EINTR;
}

}  // namespace

// --- From the guest ------------------------------------------------------------------------------

u32 VsockConnection::credit_left() const {
    const u32 flying = sent_ - peer_forwarded_;
    return flying < peer_alloc_ ? peer_alloc_ - flying : 0;  // (whatever the guest says)
}

bool VsockConnection::credit(const VsockHeader& header) {
    peer_alloc_ = header.buf_alloc;
    peer_forwarded_ = header.fwd_cnt;
    if (!starved_ || credit_left() == 0) return false;
    starved_ = false;
    return true;
}

bool VsockConnection::take(const Chain& chain, u32 offset, u32 size) {
    if (size > buffer_ - (received_ - forwarded_)) return false;
    received_ += size;
    u32 done = 0;
    while (flushed() && done < size && !host_deaf_) {
        Pieces pieces(chain.readable(), offset + done, size - done);
        const ssize_t sent = ::sendmsg(fd(), &pieces.message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && would_block(errno)) break;
        if (sent < 0) {
            host_takes_no_more();
        } else {
            done += static_cast<u32>(sent);
        }
    }
    if (host_deaf_) done = size;
    took(done);
    if (done < size) {
        const std::size_t before = pending_.size();
        pending_.resize(before + size - done);
        chain.read(offset + done, std::span(pending_).subspan(before));
    }
    return true;
}

void VsockConnection::flush() {
    while (!flushed() && !host_deaf_) {
        const std::span left = std::span(pending_).subspan(pending_start_);
        const ssize_t sent = ::send(fd(), left.data(), left.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && would_block(errno)) break;
        if (sent < 0) {
            host_takes_no_more();
            return;
        }
        took(static_cast<u32>(sent));
        pending_start_ += static_cast<std::size_t>(sent);
    }
    if (flushed()) {
        std::vector<u8>().swap(pending_);
        pending_start_ = 0;
        if (guest_sends_no_more()) ::shutdown(fd(), SHUT_WR);
    } else if (pending_start_ > pending_.size() / 2) {
        pending_.erase(pending_.begin(), pending_.begin() + static_cast<s64>(pending_start_));
        pending_start_ = 0;
    }
}

void VsockConnection::took(u32 bytes) {
    forwarded_ += bytes;
    if (forwarded_ - reported_ >= buffer_ / 2) say(VsockPacket::kCreditUpdate);
}

void VsockConnection::host_takes_no_more() {
    host_deaf_ = true;
    took(static_cast<u32>(pending_.size() - pending_start_));
    std::vector<u8>().swap(pending_);
    pending_start_ = 0;
    if (!(host_flags_ & VsockPacket::kNoReceive)) {
        host_flags_ |= VsockPacket::kNoReceive;
        say(VsockPacket::kShutdown);
    }
}

void VsockConnection::guest_shutdown(u32 flags) {
    guest_flags_ |= flags & VsockPacket::kNeither;
    if (guest_flags_ & VsockPacket::kNoReceive) ::shutdown(fd(), SHUT_RD);
    if (guest_sends_no_more()) flush();
}

// --- To the guest --------------------------------------------------------------------------------

bool VsockConnection::has_something() const {
    if (say_ != 0) return true;
    return state == State::kOpen && readable_ && !starved_;
}

void VsockConnection::host_says_no_more() {
    readable_ = false;
    // A half-closed socket goes on taking; a closed one does not, and says so by POLLHUP.
    pollfd look{fd(), 0, 0};
    const bool closed = ::poll(&look, 1, 0) > 0 && (look.revents & (POLLHUP | POLLERR)) != 0;
    const u32 flags = closed ? VsockPacket::kNeither : VsockPacket::kNoSend;
    if ((host_flags_ & flags) == flags) return;
    host_flags_ |= flags;
    say(VsockPacket::kShutdown);
}

bool VsockConnection::next_packet(VsockHeader& header, const Chain& chain) {
    if (!choose(header, chain)) return false;
    header.buf_alloc = buffer_;
    header.fwd_cnt = reported_ = forwarded_;
    say_ &= ~(1u << VsockPacket::kCreditUpdate);  // it went along
    return true;
}

bool VsockConnection::choose(VsockHeader& header, const Chain& chain) {
    auto said = [&](VsockPacket::Op op) {
        if (!(say_ & 1u << op)) return false;
        say_ &= ~(1u << op);
        header.op = op;
        return true;
    };
    if (said(VsockPacket::kRst)) return true;
    if (state == State::kDead || state == State::kOrphan) return false;
    if (said(VsockPacket::kRequest) || said(VsockPacket::kResponse)) return true;
    while (state == State::kOpen && readable_ && !(guest_flags_ & VsockPacket::kNoReceive)) {
        const u32 most = std::min({credit_left(), chain.writable_bytes() - kHeader, kMostPayload});
        if (most == 0) {
            if (!starved_) say(VsockPacket::kCreditRequest);
            starved_ = true;
            break;
        }
        Pieces pieces(chain.writable(), kHeader, most);
        const ssize_t got = ::recvmsg(fd(), &pieces.message, MSG_DONTWAIT);
        if (got > 0) {
            sent_ += static_cast<u32>(got);
            header.op = VsockPacket::kRw;
            header.len = static_cast<u32>(got);
            return true;
        }
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && errno == EAGAIN) {
            readable_ = false;
        } else {
            host_says_no_more();
        }
    }
    if (said(VsockPacket::kCreditUpdate) || said(VsockPacket::kCreditRequest)) return true;
    if (said(VsockPacket::kShutdown)) {
        header.flags = host_flags_;
        return true;
    }
    return false;
}

bool VsockConnection::tell_host(const char* text, std::size_t size) {
    return ::send(fd(), text, size, MSG_NOSIGNAL | MSG_DONTWAIT) == static_cast<ssize_t>(size);
}

}  // namespace polyvisor::virtio
