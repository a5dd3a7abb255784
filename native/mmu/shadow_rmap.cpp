// The reverse map: which shadow entries map a guest-physical page (or block of 2 MB or 1 GB).
#include <algorithm>

#include "mmu/shadow.hpp"

namespace polyvisor {

void ShadowMmu::rmap_add(u64 gpa, unsigned level, u32 entry) {
    u32 node = free_nodes_;
    if (node == kNone) {
        node = static_cast<u32>(nodes_.size());
        nodes_.push_back({});
    } else {
        free_nodes_ = nodes_[node].next;
    }
    u64 key = rmap_key(gpa, level);
    nodes_[node] = {entry, rmap_.find(key)};
    rmap_.set(key, node);
}

void ShadowMmu::rmap_remove(u64 gpa, unsigned level, u32 entry) {
    u64 key = rmap_key(gpa, level);
    u32 before = kNone, node = rmap_.find(key);
    while (node != kNone && nodes_[node].entry != entry) {
        before = node;
        node = nodes_[node].next;
    }
    if (node == kNone) return;
    u32 after = nodes_[node].next;
    if (before != kNone) {
        nodes_[before].next = after;
    } else if (after != kNone) {
        rmap_.set(key, after);
    } else {
        rmap_.erase(key);
    }
    nodes_[node].next = free_nodes_;
    free_nodes_ = node;
}

void ShadowMmu::rmap_drop(u64 gpa, unsigned level) {
    for (u32 node; (node = rmap_.find(rmap_key(gpa, level))) != kNone;) {
        u32 entry = nodes_[node].entry;
        drop_entry(entry >> 9, entry & 511);
    }
}

void ShadowMmu::rmap_protect(u64 gpa, unsigned level) {
    for (u32 node = rmap_.find(rmap_key(gpa, level)); node != kNone; node = nodes_[node].next) {
        u64& entry = table(nodes_[node].entry >> 9)[nodes_[node].entry & 511];
        if (!(entry & kPteWritable)) continue;
        entry &= ~u64{kPteWritable};
        stale_ = true;
    }
}

/// No entry lets the page be written. A block that the page is in becomes read-only as a whole; the
/// next store to it makes smaller pages.
void ShadowMmu::protect_page(u64 gpa) {
    for (unsigned level = 1; level <= 3; ++level) rmap_protect(gpa, level);
}

void ShadowMmu::unmap(u64 gpa, u64 size) {
    if (size == 0) return;
    u64 last = gpa + size - 1;
    for (unsigned level = 1; level <= 3; ++level) {
        u64 step = bit(level_shift(level));
        for (u64 at = align_down(gpa, step); at <= last; at += step) {
            if (level == 1) zap_table(at);
            rmap_drop(at, level);
        }
    }
    flush_now();
}

void ShadowMmu::write_protect(u64 gpa, u64 size) {
    if (size == 0) return;
    u64 last = gpa + size - 1;
    for (unsigned level = 1; level <= 3; ++level) {
        u64 step = bit(level_shift(level));
        for (u64 at = align_down(gpa, step); at <= last; at += step) rmap_protect(at, level);
    }
    flush_now();
}

}  // namespace polyvisor
