// The blocks of one vCPU: found by guest-physical address, IP and mode; dropped when the guest
// stores to the bytes they were made from.
//
// Which pages hold code of which vCPU is kept in one CodePages per engine, with the page flag
// kPageCode as its summary: a page that has it is never in a soft TLB as writable, so every store
// to it comes to note_store(). When the flag is set for the first time, the other vCPUs are asked
// to drop what writable translation they have; one that had one reports the page as stored to,
// because it may have written since. So a store by one vCPU reaches the others' blocks at their
// next block boundary, which is all that x86 promises without a serialising instruction (SDM
// 3A, 8.1.3).
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "memory/guest_memory.hpp"
#include "soft/uop.hpp"

namespace polyvisor::soft {

class BlockCache;

/// Shared by the vCPUs of a machine.
class CodePages {
  public:
    explicit CodePages(GuestMemory& memory) : memory_(memory) {}

    void add(BlockCache* cache);
    void remove(BlockCache* cache);
    /// `cache` is about to make code of the page at gpa.
    void claim(BlockCache* cache, u64 gpa);
    /// `cache` has no block left in the page.
    void release(BlockCache* cache, u64 gpa);
    /// Bytes of a code page were written by `writer` (nullptr: by a device or the host): tells the
    /// rest.
    void stored(BlockCache* writer, u64 gpa, u64 size);

  private:
    GuestMemory& memory_;
    std::mutex mutex_;  // before BlockCache::queue_mutex_
    std::vector<BlockCache*> caches_;
    std::unordered_map<u64, std::vector<BlockCache*>> users_;  // by page number
};

class BlockCache {
  public:
    BlockCache(VcpuFrame& frame, GuestMemory& memory, CodePages& pages);
    ~BlockCache();
    BlockCache(const BlockCache&) = delete;

    /// A block made for this place, whether or not it is stamped with the present epoch; or
    /// nullptr.
    Block* find(u64 gpa, u64 ip, u32 mode) const;
    /// Takes over a finished block and its pages.
    Block* insert(const Block& block, std::span<const Uop> uops);
    /// Room for a generic operation's instruction, as long-lived as the blocks.
    OpInsn* new_insn();

    /// This vCPU stored to a page with kPageCode. Drops the blocks that overlap; may set
    /// frame.block_dead.
    void note_store(u64 gpa, u64 size);
    /// Drops all code of the page and lets it be written without traps, as far as this vCPU goes.
    void drop_page(u64 gpa);
    /// Drops everything; only between blocks.
    void flush();
    bool full() const { return used_ > kCapacity; }

    /// From other threads: do it at the next block boundary. Raises kRequestInvalidate.
    void post_protect(u64 gpa);
    void post_stored(u64 gpa, u64 size);
    /// Takes up what was posted.
    void process_posted();

    u64 blocks_made() const { return blocks_made_; }
    u64 blocks_dropped() const { return blocks_dropped_; }

  private:
    static constexpr u64 kCapacity = 96 << 20;
    static constexpr u64 kChunk = 1 << 20;
    static constexpr unsigned kBuckets = 1 << 17;

    struct Page {
        Block* first = nullptr;
        u64 granules = 0;     ///< bit n: some block covers bytes of 64n..64n+63
        u32 idle_stores = 0;  ///< stores that hit no block, since the page was last given up
        u32 patience = 16;    ///< ... after which the page is given up
    };
    struct Posted {
        u64 gpa;
        u64 size;  ///< 0: protect
    };

    static unsigned bucket(u64 gpa) { return (gpa ^ (gpa >> 13)) & (kBuckets - 1); }
    void* allocate(u64 size);
    void add_to_page(Block* block, u64 gpa, u64 size);
    void kill(Block* block);
    void drop_overlapping(u64 gpa, u64 size);
    void rebuild(u64 page, Page& entry);
    bool drop_writable(u64 gpa);

    VcpuFrame& frame_;
    GuestMemory& memory_;
    CodePages& shared_;
    std::vector<Block*> hash_;
    std::unordered_map<u64, Page> pages_;
    std::vector<std::unique_ptr<u8[]>> chunks_;
    u64 chunk_used_ = kChunk;
    u64 used_ = 0;
    u64 blocks_made_ = 0;
    u64 blocks_dropped_ = 0;
    std::mutex queue_mutex_;  // a leaf
    std::vector<Posted> queue_;
    bool flush_posted_ = false;
};

}  // namespace polyvisor::soft
