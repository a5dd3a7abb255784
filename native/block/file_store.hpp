// A raw image: a regular file or a block device, cached by the host or with O_DIRECT.
//
// O_DIRECT wants offsets, sizes and addresses aligned. Requests whose place is not aligned go
// through a second descriptor without O_DIRECT, with which the kernel keeps direct ones coherent;
// a read-modify-write of our own would lose what others write beside it at the same time. Buffers
// that are not aligned are copied.
#pragma once

#include <sys/types.h>

#include <atomic>

#include "base/fd.hpp"
#include "block/store.hpp"

namespace polyvisor::block {

enum class Cache : u8 {
    kWriteback,  ///< the host's page cache; a flush waits for the medium
    kNone,       ///< past the host's page cache (O_DIRECT); a flush waits for the medium
    kUnsafe,     ///< the host's page cache; a flush does nothing
};
/// "writeback", "none", "unsafe". Throws ConfigError.
Cache parse_cache(const std::string& name);

class FileStore final : public Store {
  public:
    struct Options {
        bool read_only = false;
        Cache cache = Cache::kWriteback;
        bool lock = true;  ///< against a second writer, with an OFD lock
    };
    /// Throws HostError: the file cannot be opened or used, or (EBUSY) is in use.
    FileStore(const std::string& path, const Options& options);
    /// A file that is open already, cached and unlocked.
    FileStore(OwnedFd fd, std::string name, Cache cache);

    Info info() const override;
    int perform(Request& request) override;
    bool try_now(Request& request) override;
    void resize(u64 size) override;
    std::string name() const override { return path_; }
    FileStore* file() override { return this; }

    /// The descriptor with which the kernel can do the request as it is; -1: only perform() can.
    int ring_fd(const Request& request) const;
    bool ignores_flush() const { return cache_ == Cache::kUnsafe; }

  private:
    void probe();
    void lock_image();
    bool place_aligned(const Request& request) const;
    bool buffers_aligned(const Request& request) const;
    int transfer(int fd, Request& request) const;
    int transfer_bounced(Request& request) const;
    int discard(const Request& request) const;
    int write_zeroes(const Request& request) const;
    int flush() const;

    std::string path_;
    OwnedFd fd_;
    OwnedFd cached_;  // kNone: the same file without O_DIRECT
    Cache cache_;
    bool read_only_ = false, block_device_ = false;
    u32 block_size_ = kSectorSize, physical_block_size_ = kPageSize;
    u32 place_alignment_ = 1, memory_alignment_ = 1;  // kNone
    std::atomic<bool> no_wait_{true};                 // the file system knows RWF_NOWAIT
};

}  // namespace polyvisor::block
