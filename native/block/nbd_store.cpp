#include "block/nbd_store.hpp"

#include <endian.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "base/error.hpp"

namespace polyvisor::block {

namespace {

constexpr u64 kServerMagic = 0x4e42444d41474943, kOptionMagic = 0x49484156454f5054;
constexpr u64 kReplyMagic = 0x3e889045565a9;
constexpr u32 kRequestMagic = 0x25609513, kSimpleReplyMagic = 0x67446698;
constexpr u16 kFixedNewstyle = 1, kNoZeroes = 2;
constexpr u32 kOptionGo = 7;
constexpr u32 kReplyAck = 1, kReplyInfo = 3, kReplyError = u32{1} << 31;
constexpr u16 kInfoExport = 0, kInfoBlockSize = 3;
enum TransmissionFlag : u16 {
    kReadOnlyFlag = 1 << 1,
    kSendFlush = 1 << 2,
    kSendFua = 1 << 3,
    kSendTrim = 1 << 5,
    kSendWriteZeroes = 1 << 6,
    kMultiConn = 1 << 8,
};
enum Command : u16 { kRead, kWrite, kDisconnect, kFlush, kTrim, kWriteZeroes = 6 };
constexpr u16 kFua = 1, kNoHole = 2;
constexpr u64 kMostRange = 1 << 30;  // of a trim
constexpr u32 kMostOptionReply = 64 << 10;
constexpr int kSecondsToAnswer = 30;  // to open the image takes a while

// Fields are big-endian, without padding between them.
class Message {
  public:
    Message& u16_(u16 value) { return put(htobe16(value)); }
    Message& u32_(u32 value) { return put(htobe32(value)); }
    Message& u64_(u64 value) { return put(htobe64(value)); }
    iovec part() { return {bytes_.data(), size_}; }

  private:
    template <class T>
    Message& put(T value) {
        std::memcpy(bytes_.data() + size_, &value, sizeof value);
        size_ += sizeof value;
        return *this;
    }
    std::array<u8, 64> bytes_;
    std::size_t size_ = 0;
};

template <class T>
T take(std::span<const u8>& bytes) {
    T value = 0;
    if (bytes.size() < sizeof value) return 0;
    std::memcpy(&value, bytes.data(), sizeof value);
    bytes = bytes.subspan(sizeof value);
    if constexpr (sizeof value == 2) return be16toh(value);
    if constexpr (sizeof value == 4) return be32toh(value);
    if constexpr (sizeof value == 8) return be64toh(value);
}

// All of it, or false with errno.
template <class Call>
bool transfer(std::span<iovec> parts, Call call) {
    Request rest{.buffers = parts};
    for (const iovec& part : parts) rest.size += part.iov_len;
    while (rest.size != 0) {
        msghdr message{};
        message.msg_iov = rest.buffers.data();
        message.msg_iovlen = rest.buffers.size();
        const ssize_t done = call(message);
        if (done < 0 && errno == EINTR) continue;
        if (done == 0) errno = ECONNRESET;
        if (done <= 0) return false;
        rest.advance(static_cast<u64>(done));
    }
    return true;
}
bool send_all(int fd, std::span<iovec> parts) {
    return transfer(parts, [fd](msghdr& m) { return ::sendmsg(fd, &m, MSG_NOSIGNAL); });
}
bool receive_all(int fd, std::span<iovec> parts) {
    return transfer(parts, [fd](msghdr& m) { return ::recvmsg(fd, &m, 0); });
}
bool receive(int fd, std::span<u8> into) {
    iovec part{into.data(), into.size()};
    return receive_all(fd, {&part, 1});
}

}  // namespace

NbdStore::NbdStore(std::vector<OwnedFd> connections, std::string name)
    : name_(std::move(name)), connections_(std::move(connections)) {
    for (OwnedFd& connection : connections_) {
        negotiate(connection.get());
        if (!(flags_ & kMultiConn)) break;
    }
    if (!(flags_ & kMultiConn)) connections_.resize(1);
    for (OwnedFd& connection : connections_) free_.push_back(connection.get());
    alive_ = static_cast<unsigned>(free_.size());
}

NbdStore::~NbdStore() {
    for (int fd : free_) {
        Message message;
        message.u32_(kRequestMagic).u16_(0).u16_(kDisconnect).u64_(0).u64_(0).u32_(0);
        iovec part = message.part();
        send_all(fd, {&part, 1});
    }
}

void NbdStore::negotiate(int fd) {
    auto need = [&](bool good, const char* what) {
        if (good) return;
        throw HostError(errno != 0 ? errno : EPROTO, name_,
                        "cannot talk to the server of disk '" + name_ + "' (" + what + ")");
    };
    const timeval limit{kSecondsToAnswer, 0}, none{0, 0};
    ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    std::array<u8, 18> greeting;
    errno = 0;
    need(receive(fd, greeting), "no greeting");
    std::span<const u8> rest(greeting);
    const u64 magic = take<u64>(rest), option = take<u64>(rest);
    const u16 server = take<u16>(rest);
    need(magic == kServerMagic && option == kOptionMagic && (server & kFixedNewstyle),
         "it does not speak NBD");
    Message hello;
    hello.u32_(server & (kFixedNewstyle | kNoZeroes));
    // The default export, whose name is empty, and how its blocks are.
    hello.u64_(kOptionMagic).u32_(kOptionGo).u32_(4 + 2 + 2).u32_(0).u16_(1).u16_(kInfoBlockSize);
    iovec part = hello.part();
    need(send_all(fd, {&part, 1}), "it hung up");
    while (true) {
        std::array<u8, 20> header;
        need(receive(fd, header), "no answer");
        rest = header;
        const u64 reply = take<u64>(rest);
        take<u32>(rest);
        const u32 type = take<u32>(rest), length = take<u32>(rest);
        need(reply == kReplyMagic && length <= kMostOptionReply, "it does not speak NBD");
        std::vector<u8> data(length);
        need(length == 0 || receive(fd, data), "a short answer");
        need(!(type & kReplyError), "it refuses the export");
        if (type == kReplyAck) break;
        if (type == kReplyInfo) take_information(data);
    }
    need(size_ >= kSectorSize, "the image is empty");
    ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &none, sizeof none);
}

void NbdStore::take_information(std::span<const u8> data) {
    const u16 kind = take<u16>(data);
    if (kind == kInfoExport) {
        size_ = align_down(take<u64>(data), kSectorSize);
        flags_ = take<u16>(data);
    } else if (kind == kInfoBlockSize) {
        least_block_ = std::clamp<u32>(take<u32>(data), kSectorSize, kPageSize);
        take<u32>(data);
        const u32 most = take<u32>(data);
        if (most >= least_block_) most_payload_ = std::min(most_payload_, most);
    }
}

Store::Info NbdStore::info() const {
    return {.size = size_,
            .read_only = (flags_ & kReadOnlyFlag) != 0,
            .block_size = least_block_,
            .threads = static_cast<unsigned>(connections_.size())};
}

int NbdStore::perform(Request& request) {
    int fd;
    {
        std::unique_lock lock(mutex_);
        freed_.wait(lock, [this] { return !free_.empty() || alive_ == 0; });
        if (alive_ == 0) return EIO;  // the server is gone
        fd = free_.back();
        free_.pop_back();
    }
    bool broken = false;
    const int error = perform_on(fd, request, broken);
    {
        std::lock_guard lock(mutex_);
        broken ? (void)--alive_ : free_.push_back(fd);
    }
    broken ? freed_.notify_all() : freed_.notify_one();
    return error;
}

int NbdStore::perform_on(int fd, Request& request, bool& broken) {
    const u16 fua = request.durable && (flags_ & kSendFua) ? kFua : 0;
    auto flush = [&] {
        return flags_ & kSendFlush ? transact(fd, 0, kFlush, 0, 0, {}, broken) : 0;
    };
    auto ranges = [&](u16 flags, u16 command) {
        while (request.size != 0) {
            const u32 size = static_cast<u32>(std::min(request.size, kMostRange));
            const int error = transact(fd, flags, command, request.offset, size, {}, broken);
            if (error != 0) return error;
            request.advance(size);
        }
        return 0;
    };
    int error = 0;
    switch (request.operation) {
        case Operation::kFlush:
            return flush();
        case Operation::kDiscard:
            return flags_ & kSendTrim ? ranges(0, kTrim) : 0;
        case Operation::kWriteZeroes:
            if (!(flags_ & kSendWriteZeroes)) return EOPNOTSUPP;
            error = ranges(fua | (request.may_unmap ? 0 : kNoHole), kWriteZeroes);
            break;
        case Operation::kRead:
        case Operation::kWrite: {
            const bool write = request.operation == Operation::kWrite;
            while (request.size != 0 && error == 0) {
                const u32 size = static_cast<u32>(std::min<u64>(request.size, most_payload_));
                std::vector<iovec> parts = request.first_bytes(size);
                error = transact(fd, write ? fua : 0, write ? kWrite : kRead, request.offset, size,
                                 parts, broken);
                request.advance(size);
            }
        }
    }
    if (error == 0 && request.durable && fua == 0) error = flush();
    return error;
}

int NbdStore::transact(int fd, u16 flags, u16 type, u64 offset, u32 size, std::span<iovec> buffers,
                       bool& broken) {
    Message message;
    message.u32_(kRequestMagic).u16_(flags).u16_(type).u64_(0).u64_(offset).u32_(size);
    std::vector<iovec> out{message.part()};
    if (type == kWrite) out.insert(out.end(), buffers.begin(), buffers.end());
    std::array<u8, 16> reply;
    broken = true;
    if (!send_all(fd, out) || !receive(fd, reply)) return EIO;
    std::span<const u8> rest(reply);
    if (take<u32>(rest) != kSimpleReplyMagic) return EIO;
    const u32 error = take<u32>(rest);
    if (error == 0 && type == kRead && !receive_all(fd, buffers)) return EIO;
    broken = false;
    return static_cast<int>(std::min<u32>(error, 4095));
}

}  // namespace polyvisor::block
