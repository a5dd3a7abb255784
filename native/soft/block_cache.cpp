#include "soft/block_cache.hpp"

#include <algorithm>
#include <cstring>
#include <new>

#include "soft/soft_tlb.hpp"

namespace polyvisor::soft {

// --- CodePages -----------------------------------------------------------------------------------

void CodePages::add(BlockCache* cache) {
    std::lock_guard lock(mutex_);
    caches_.push_back(cache);
}

void CodePages::remove(BlockCache* cache) {
    std::lock_guard lock(mutex_);
    std::erase(caches_, cache);
    for (auto& [page, users] : users_) std::erase(users, cache);
}

void CodePages::claim(BlockCache* cache, u64 gpa) {
    std::lock_guard lock(mutex_);
    auto& users = users_[gpa >> kPageShift];
    if (std::find(users.begin(), users.end(), cache) == users.end()) users.push_back(cache);
    const auto* region = memory_.find(Gpa(gpa));
    if (region == nullptr) return;
    u8 before = region->flags(gpa).fetch_or(kPageCode, std::memory_order_seq_cst);
    if (before & kPageCode) return;
    for (BlockCache* other : caches_) {
        if (other != cache) other->post_protect(gpa);
    }
}

void CodePages::release(BlockCache* cache, u64 gpa) {
    std::lock_guard lock(mutex_);
    auto at = users_.find(gpa >> kPageShift);
    if (at == users_.end()) return;
    std::erase(at->second, cache);
    if (!at->second.empty()) return;
    users_.erase(at);
    if (const auto* region = memory_.find(Gpa(gpa))) {
        region->flags(gpa).fetch_and(static_cast<u8>(~kPageCode));
    }
}

void CodePages::stored(BlockCache* writer, u64 gpa, u64 size) {
    std::lock_guard lock(mutex_);
    if (writer != nullptr && caches_.size() == 1) return;
    auto at = users_.find(gpa >> kPageShift);
    if (at == users_.end()) return;
    for (BlockCache* user : at->second) {
        if (user != writer) user->post_stored(gpa, size);
    }
}

// --- BlockCache ----------------------------------------------------------------------------------

BlockCache::BlockCache(VcpuFrame& frame, GuestMemory& memory, CodePages& pages)
    : frame_(frame), memory_(memory), shared_(pages), hash_(kBuckets) {
    shared_.add(this);
}

BlockCache::~BlockCache() {
    for (auto& [page, entry] : pages_) shared_.release(this, page << kPageShift);
    shared_.remove(this);
}

void* BlockCache::allocate(u64 size) {
    size = align_up(size, 16);
    if (chunk_used_ + size > kChunk) {
        chunks_.push_back(std::make_unique_for_overwrite<u8[]>(kChunk));
        chunk_used_ = 0;
    }
    void* at = chunks_.back().get() + chunk_used_;
    chunk_used_ += size;
    used_ += size;
    return at;
}

OpInsn* BlockCache::new_insn() {
    return new (allocate(sizeof(OpInsn))) OpInsn{};
}

Block* BlockCache::find(u64 gpa, u64 ip, u32 mode) const {
    for (Block* block = hash_[bucket(gpa)]; block != nullptr; block = block->hash_next) {
        if (block->gpa == gpa && block->ip == ip && block->mode == mode) return block;
    }
    return nullptr;
}

Block* BlockCache::insert(const Block& made, std::span<const Uop> uops) {
    auto* stored = static_cast<Uop*>(allocate(uops.size_bytes()));
    std::memcpy(stored, uops.data(), uops.size_bytes());
    auto* block = new (allocate(sizeof(Block))) Block(made);
    block->uops = stored;
    ++blocks_made_;
    Block*& head = hash_[bucket(block->gpa)];
    block->hash_next = head;
    head = block;
    u64 first = std::min<u64>(block->bytes, kPageSize - (block->gpa & kPageMask));
    add_to_page(block, block->gpa, first);
    if (block->gpa2 != ~u64{0}) add_to_page(block, block->gpa2, block->bytes - first);
    return block;
}

void BlockCache::add_to_page(Block* block, u64 gpa, u64 size) {
    u64 number = gpa >> kPageShift;
    auto [at, fresh] = pages_.try_emplace(number);
    Page& page = at->second;
    if (page.first == nullptr) {
        drop_writable(gpa);
        shared_.claim(this, gpa);
    }
    Block*& link = number == block->gpa >> kPageShift ? block->page_next : block->page2_next;
    link = page.first;
    page.first = block;
    u64 from = (gpa & kPageMask) >> 6;
    u64 to = ((gpa & kPageMask) + size - 1) >> 6;
    for (u64 n = from; n <= to; ++n) page.granules |= bit(static_cast<unsigned>(n));
}

// Takes the block out of the hash and makes every link and jump-cache entry to it fail; its memory
// stays until flush(), since it may be executing.
void BlockCache::kill(Block* block) {
    if (block->epoch == kDeadEpoch) return;
    block->epoch = kDeadEpoch;
    ++blocks_dropped_;
    if (frame_.block == block) frame_.block_dead = true;
    for (Block** at = &hash_[bucket(block->gpa)]; *at != nullptr; at = &(*at)->hash_next) {
        if (*at == block) {
            *at = block->hash_next;
            break;
        }
    }
}

// Takes the dead blocks out of a page's list and recomputes what the others cover.
void BlockCache::rebuild(u64 number, Page& page) {
    Block* block = page.first;
    page.first = nullptr;
    page.granules = 0;
    while (block != nullptr) {
        bool first_page = number == block->gpa >> kPageShift;
        Block*& link = first_page ? block->page_next : block->page2_next;
        Block* next = link;
        if (block->epoch != kDeadEpoch) {
            link = page.first;
            page.first = block;
            u64 in_first = std::min<u64>(block->bytes, kPageSize - (block->gpa & kPageMask));
            u64 start = first_page ? block->gpa & kPageMask : 0;
            u64 size = first_page ? in_first : block->bytes - in_first;
            for (u64 n = start >> 6; n <= (start + size - 1) >> 6; ++n) {
                page.granules |= bit(static_cast<unsigned>(n));
            }
        }
        block = next;
    }
}

void BlockCache::note_store(u64 gpa, u64 size) {
    shared_.stored(this, gpa, size);
    drop_overlapping(gpa, size);
}

void BlockCache::drop_overlapping(u64 gpa, u64 size) {
    auto at = pages_.find(gpa >> kPageShift);
    if (at == pages_.end()) return;
    Page& page = at->second;
    u64 start = gpa & kPageMask;
    u64 end = std::min<u64>(start + size, kPageSize);
    u64 mask = 0;
    for (u64 n = start >> 6; n <= (end - 1) >> 6; ++n) mask |= bit(static_cast<unsigned>(n));
    bool hit = false;
    if (page.granules & mask) {
        u64 number = gpa >> kPageShift;
        for (Block* block = page.first; block != nullptr;) {
            bool first_page = number == block->gpa >> kPageShift;
            u64 in_first = std::min<u64>(block->bytes, kPageSize - (block->gpa & kPageMask));
            u64 from = first_page ? block->gpa & kPageMask : 0;
            u64 to = first_page ? from + in_first : block->bytes - in_first;
            if (start < to && from < end) {
                kill(block);
                hit = true;
            }
            block = first_page ? block->page_next : block->page2_next;
        }
        if (hit) rebuild(number, page);
    }
    if (page.first == nullptr || (!hit && ++page.idle_stores >= page.patience)) {
        // Data now, as far as one can tell. A page that turns out to be both is given up ever
        // later.
        page.patience = std::min(page.patience * 2, 1u << 16);
        drop_page(gpa);
    }
}

void BlockCache::drop_page(u64 gpa) {
    u64 number = gpa >> kPageShift;
    auto at = pages_.find(number);
    if (at == pages_.end()) return;
    Page& page = at->second;
    for (Block* block = page.first; block != nullptr;) {
        Block* next = number == block->gpa >> kPageShift ? block->page_next : block->page2_next;
        kill(block);
        block = next;
    }
    page.first = nullptr;
    page.granules = 0;
    page.idle_stores = 0;
    shared_.release(this, gpa);
}

void BlockCache::flush() {
    for (auto& [number, page] : pages_) {
        if (page.first != nullptr) shared_.release(this, number << kPageShift);
    }
    pages_.clear();
    std::fill(hash_.begin(), hash_.end(), nullptr);
    chunks_.clear();
    chunk_used_ = kChunk;
    used_ = 0;
    frame_.jump_cache->clear();
    frame_.block = nullptr;
    frame_.link_slot_valid = false;
}

// --- From other threads --------------------------------------------------------------------------

void BlockCache::post_protect(u64 gpa) {
    post_stored(gpa, 0);
}

void BlockCache::post_stored(u64 gpa, u64 size) {
    {
        std::lock_guard lock(queue_mutex_);
        if (queue_.size() < 4096) {
            queue_.push_back({gpa, size});
        } else {
            flush_posted_ = true;
        }
    }
    frame_.irq_req.fetch_or(kRequestInvalidate);
}

bool BlockCache::drop_writable(u64 gpa) {
    const auto* region = memory_.find(Gpa(gpa));
    if (region == nullptr) return false;
    return drop_writable_host(frame_, region->host(align_down(gpa, kPageSize)));
}

void BlockCache::process_posted() {
    std::vector<Posted> posted;
    bool flush_all;
    {
        std::lock_guard lock(queue_mutex_);
        posted.swap(queue_);
        flush_all = std::exchange(flush_posted_, false);
    }
    if (flush_all) {
        flush_tlb(frame_);
        flush();
        return;
    }
    for (const Posted& event : posted) {
        if (event.size != 0) {
            drop_overlapping(event.gpa, event.size);
        } else if (drop_writable(event.gpa)) {
            // It may have stored between the claim and now.
            u64 page = align_down(event.gpa, kPageSize);
            shared_.stored(this, page, kPageSize);
            drop_page(page);
        }
    }
}

}  // namespace polyvisor::soft
