// The client's side of the NBD protocol (newstyle, simple replies): a store on a server that is
// connected already. Each connection serves one request at a time; there may be several.
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
#pragma once

#include <condition_variable>
#include <mutex>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "block/store.hpp"

namespace polyvisor::block {

class NbdStore final : public Store {
  public:
    /// Negotiates the default export on every connection. Throws HostError. Only the first
    /// connection is used when the server does not promise that a flush on one counts for all.
    NbdStore(std::vector<OwnedFd> connections, std::string name);
    ~NbdStore() override;

    Info info() const override;
    int perform(Request& request) override;
    std::string name() const override { return name_; }

  private:
    void negotiate(int fd);
    void take_information(std::span<const u8> data);
    int transact(int fd, u16 flags, u16 type, u64 offset, u32 size, std::span<iovec> buffers,
                 bool& broken);
    int perform_on(int fd, Request& request, bool& broken);

    const std::string name_;
    std::vector<OwnedFd> connections_;
    u64 size_ = 0;
    u16 flags_ = 0;  // what the server can do
    u32 least_block_ = kSectorSize, most_payload_ = 32 << 20;

    std::mutex mutex_;  // a leaf
    std::condition_variable freed_;
    std::vector<int> free_;
    unsigned alive_ = 0;
};

}  // namespace polyvisor::block
