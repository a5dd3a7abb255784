// Where a disk's bytes are: a file, a block device, an image behind qemu-nbd, an overlay on
// another store, an object of Python's. A store does one request and blocks meanwhile; a Channel
// (channel.hpp) makes many asynchronous requests of that.
//
// To add a store: derive, and answer info() and perform().
//
//     class Zeroes final : public Store {
//       public:
//         Info info() const override { return {.size = 1 << 20, .read_only = true}; }
//         int perform(Request& request) override {
//             for (const iovec& part : request.buffers) std::memset(part.iov_base, 0,
//             part.iov_len); return 0;
//         }
//         std::string name() const override { return "zeroes"; }
//     };
#pragma once

#include <sys/uio.h>

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/types.hpp"

namespace polyvisor::block {

inline constexpr u64 kSectorSize = 512;

enum class Operation : u8 { kRead, kWrite, kFlush, kDiscard, kWriteZeroes };
/// "read", "write", ...
const char* name_of(Operation operation);

/// Belongs to who makes it and stays in place until it is done.
struct Request {
    Operation operation = Operation::kRead;
    bool durable = false;      ///< writes: done only when it would survive a loss of power
    bool may_unmap = false;    ///< kWriteZeroes: the room need not stay reserved
    u64 offset = 0;            ///< in bytes; what is left to do begins here
    u64 size = 0;              ///< in bytes: all of `buffers` together; without any for the others
    std::span<iovec> buffers;  ///< host memory; a store may change the entries as it goes on
    int error = 0;             ///< errno, once it is done

    /// The first `bytes` of it are done.
    void advance(u64 bytes);
    /// The buffers of its first `bytes`.
    std::vector<iovec> first_bytes(u64 bytes) const;
};

/// Copy between buffers and the first bytes of `parts`, which have as many.
void gather(std::span<const iovec> parts, std::span<u8> into);
void scatter(std::span<const iovec> parts, std::span<const u8> from);

class Store {
  public:
    struct Info {
        u64 size = 0;  ///< in bytes, a multiple of 512
        bool read_only = false;
        u32 block_size = kSectorSize;         ///< what requests should be aligned to
        u32 physical_block_size = kPageSize;  ///< what the host writes at once
        unsigned threads = 4;                 ///< how many perform() calls at a time are of use
    };

    virtual ~Store() = default;
    Store() = default;
    Store(const Store&) = delete;
    Store& operator=(const Store&) = delete;

    /// Any thread.
    virtual Info info() const = 0;
    /// Does what is left of a request, and blocks meanwhile: 0 or an errno. Any number of threads
    /// at a time. The range lies within info().size, but the size may have changed since.
    virtual int perform(Request& request) = 0;
    /// Tries to do a request without blocking: true when it is done. Otherwise some of it may be,
    /// which the request then says.
    virtual bool try_now(Request& request) { return (void)request, false; }
    /// Gives the disk another size. Throws HostError, StateMismatch when that is impossible.
    virtual void resize(u64 size);
    /// For messages: a path, or what else it is.
    virtual std::string name() const = 0;
    /// Not null: the kernel can do its requests asynchronously.
    virtual class FileStore* file() { return nullptr; }
};

}  // namespace polyvisor::block
