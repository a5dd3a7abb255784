// One stream of virtio-vsock: credit both ways, and the host's socket at its other end. It knows no
// queues: the device asks it for the next packet and gives it those of the guest.
//
// What the guest sends goes into the socket at once; what the socket does not take now is kept, up
// to the credit that the guest was given. What the host sends is read straight into the guest's
// buffers, and only as much as the guest has credit for: until then it stays in the socket, and
// whoever fills that waits.
#pragma once

#include <vector>

#include "base/fd.hpp"
#include "virtio/queue.hpp"
#include "virtio/vsock_packet.hpp"

namespace polyvisor::virtio {

class VsockConnection {
  public:
    enum class State : u8 {
        kGreeting,   ///< the host's program has to say CONNECT
        kRequested,  ///< the guest has to answer
        kOpen,
        kOrphan,  ///< the guest is done with it; what it had sent is still to be taken
        kDead,    ///< only a RST is left to be said
    };

    /// `socket` is a stream socket that does not block. `buffer`: bytes it may keep for the host.
    VsockConnection(u64 id, OwnedFd socket, State state, u32 buffer)
        : id(id), state(state), socket_(std::move(socket)), buffer_(buffer) {}

    const u64 id;  ///< never used again
    State state;
    u32 guest_port = 0, host_port = 0;
    bool told_host = false;  ///< a host that said CONNECT is told "OK"
    bool queued = false;     ///< in the device's list of those with something to say

    int fd() const { return socket_.get(); }
    OwnedFd take_socket() { return std::move(socket_); }

    // --- From the guest --------------------------------------------------------------------------

    /// Notes the credit that a packet brings. True: sending was held up by it, and need not be now.
    bool credit(const VsockHeader& header);
    /// `size` bytes of `chain` from `offset` on. False: more than it had credit for.
    bool take(const Chain& chain, u32 offset, u32 size);
    /// The guest's SHUTDOWN.
    void guest_shutdown(u32 flags);
    /// What is kept goes to the socket, as far as it takes it.
    void flush();
    bool flushed() const { return pending_.size() == pending_start_; }
    /// The guest neither sends nor receives, and the host has all it sent.
    bool done() const { return guest_flags_ == VsockPacket::kNeither && flushed(); }
    bool guest_sends_no_more() const { return (guest_flags_ & VsockPacket::kNoSend) != 0; }

    // --- To the guest ----------------------------------------------------------------------------

    /// A packet that is to be said once: kRequest, kResponse, kRst, kCreditUpdate.
    void say(VsockPacket::Op op) { say_ |= 1u << op; }
    /// The socket may have something to read.
    void set_readable() { readable_ = true; }
    bool has_something() const;
    /// Fills in op, flags, len, credit, and the payload from offset sizeof(VsockHeader) of the
    /// chain on. False: there is nothing to say now.
    bool next_packet(VsockHeader& header, const Chain& chain);

    /// Text for the host before the stream begins. False: it is gone.
    bool tell_host(const char* text, std::size_t size);

  private:
    bool choose(VsockHeader& header, const Chain& chain);
    u32 credit_left() const;
    void host_takes_no_more();
    void host_says_no_more();
    void took(u32 bytes);

    OwnedFd socket_;
    const u32 buffer_;
    u32 say_ = 0;  // a bit per Op
    bool readable_ = false, starved_ = false;

    std::vector<u8> pending_;  // from pending_start_ on
    std::size_t pending_start_ = 0;
    u32 received_ = 0, forwarded_ = 0, reported_ = 0;
    bool host_deaf_ = false;

    u32 sent_ = 0, peer_alloc_ = 0, peer_forwarded_ = 0;
    u32 guest_flags_ = 0;  // of the guest's SHUTDOWNs
    u32 host_flags_ = 0;   // what ours have to say
};

}  // namespace polyvisor::virtio
