// virtio-vsock (virtio 1.2, 5.10): sockets between the guest and programs of the host, which sees
// them as AF_UNIX sockets, in the way that Firecracker made common:
//
// - The guest connects to port P of CID 2 (the host): we connect to the socket PATH_P.
// - A program of the host connects to PATH and writes "CONNECT P\n": when a program of the guest
//   listens on P, it reads "OK <our port>\n" and is connected; else the connection is closed.
//
// connect() and listen() do the same inside this process, without files.
//
// What the guest sends is written to the host's socket on the thread that notifies. What the host
// sends is read on the event loop's thread, or where the guest brings buffers. Connections with
// something to say take turns, a packet each. However much a guest asks for, the host keeps
// bounded: kMostConnections, what they have credit for, and kMostResets answers to packets of none.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>

#include "virtio/device.hpp"
#include "virtio/vsock_connection.hpp"

namespace polyvisor::virtio {

class Vsock final : public Device {
  public:
    static constexpr u64 kHostCid = 2;
    static constexpr std::size_t kMostConnections = 4096, kMostResets = 256;
    /// Bytes kept for a reader that is behind, and when there are many connections already.
    static constexpr u32 kBuffer = 256 << 10, kSmallBuffer = 32 << 10;
    static constexpr std::size_t kMany = 256;

    struct Config {
        u64 cid = 3;       ///< the guest's, 3 or more
        std::string path;  ///< of the host's socket; empty: none, nor any PATH_P
    };
    /// Throws ConfigError when the path cannot be used or a program serves it, HostError.
    Vsock(const Environment& environment, Config config);
    ~Vsock() override;

    u64 cid() const { return config_.cid; }
    const std::string& path() const { return config_.path; }
    /// A socket to port `port` of the guest, on which "OK <our port>\n" comes first, or its end.
    OwnedFd connect(u32 port);
    /// The guest's connections to `port` of the host: for each, `socket` gets a message of 4 bytes
    /// (the guest's port) with the connection's descriptor (SCM_RIGHTS). When it takes none, the
    /// guest is refused; when it is closed, the port is free again. Throws ConfigError when the
    /// port is taken.
    void listen(u32 port, OwnedFd socket);
    std::size_t connections() const;

    void machine_ended() override;

  protected:
    void serve(unsigned index, Queue& queue) override;
    void stop() override;
    std::vector<u8> save_device() const override { return {}; }
    void restore_device(std::span<const u8> state) override;

  private:
    using State = VsockConnection::State;
    enum QueueIndex : unsigned { kRx = 0, kTx = 1, kEvents = 2 };
    static u64 key(u32 guest_port, u32 host_port) { return u64{guest_port} << 32 | host_port; }

    void take_packets(Queue& queue);
    void give_packets(Queue& queue);
    void give_events(Queue& queue);
    bool next_packet(VsockHeader& header);

    // With the mutex.
    void take_packet(const Chain& chain, const VsockHeader& header);
    void on_packet(VsockConnection& connection, const Chain& chain, const VsockHeader& header);
    void refuse(const VsockHeader& header);
    void accept_guest(const VsockHeader& header);
    OwnedFd reach_host(u32 host_port, u32 guest_port);
    VsockConnection* add(OwnedFd socket, State state);
    void enter(VsockConnection& connection, u32 guest_port, u32 host_port);
    void request(VsockConnection& connection, u32 guest_port);
    void read_greeting(VsockConnection& connection, bool ended);
    void reset_connection(VsockConnection& connection);
    void forget(VsockConnection& connection);
    void ready(VsockConnection& connection);
    void bury(OwnedFd socket);

    void accept_host();
    void on_socket(u64 id, u32 events);
    void pump();
    void bury_all();
    void open_listener();
    void close_listener();

    const Config config_;
    OwnedFd listener_;

    mutable std::mutex mutex_;                                               // after the queues'
    std::unordered_map<u64, std::unique_ptr<VsockConnection>> connections_;  // by id
    std::unordered_map<u64, VsockConnection*> ports_;                        // by key()
    std::deque<VsockConnection*> ready_;  // with something to say, each once
    std::deque<VsockHeader> resets_;      // for packets of no connection
    std::map<u32, OwnedFd> listeners_;    // of this process, by port
    std::vector<OwnedFd> graves_;         // to be closed by the loop's thread
    u64 next_id_ = 1;
    u32 next_port_ = 1u << 30;
    bool tx_waits_ = false, posted_ = false, say_reset_ = false;

    Chain chain_in_, chain_out_, chain_event_;               // with the queues' mutexes
    std::shared_ptr<void> alive_ = std::make_shared<int>();  // for tasks on the loop
};

}  // namespace polyvisor::virtio
