// The reverse map: which shadow entries map a guest-physical page (or block of 2 MB or 1 GB).
#include <algorithm>

#include "mmu/shadow.hpp"

namespace polyvisor {
namespace {

constexpr u64 kGpaEnd = bit(52);  // no entry leads further

}  // namespace

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

// The leaves that map any of [gpa, gpa + size): by address, or, when there are fewer tables than
// addresses, by table.
std::vector<u32> ShadowMmu::leaves_in(u64 gpa, u64 size) const {
    std::vector<u32> found;
    if (size == 0 || gpa >= kGpaEnd) return found;
    u64 last = gpa + std::min(size, kGpaEnd - gpa) - 1;
    if (last - gpa < u64{used_} * 64 * kPageSize) {
        for (unsigned level = 1; level <= 3; ++level) {
            u64 step = bit(level_shift(level));
            for (u64 at = align_down(gpa, step); at <= last; at += step) {
                u32 node = rmap_.find(rmap_key(at, level));
                for (; node != kNone; node = nodes_[node].next) found.push_back(nodes_[node].entry);
            }
        }
        return found;
    }
    for (u32 id = 0; id < pages_.size(); ++id) {
        const Page& page = pages_[id];
        for (u32 n = 0, left = page.kind == Kind::kFree ? 0 : page.present; left != 0; ++n) {
            u64 entry = table(id)[n];
            if (!(entry & kPtePresent)) continue;
            --left;
            if (!is_leaf(entry, page.level)) continue;
            u64 at = leaf_gpa(id, n);
            if (at <= last && gpa < at + bit(level_shift(page.level))) {
                found.push_back(entry_id(id, n));
            }
        }
    }
    return found;
}

void ShadowMmu::unmap(u64 gpa, u64 size) {
    for (u32 entry : leaves_in(gpa, size)) drop_entry(entry >> 9, entry & 511);
    for (std::size_t n = 0; n < guest_tables_.size(); ++n) {
        u64 at = guest_tables_[n].gfn << kPageShift;
        bool inside = gpa < at + kPageSize && (at < gpa || at - gpa < size);
        if (size != 0 && guest_tables_[n].first != kNone && inside) zap_table(at);
    }
    flush_now();
}

void ShadowMmu::write_protect(u64 gpa, u64 size) {
    for (u32 id : leaves_in(gpa, size)) {
        u64& entry = table(id >> 9)[id & 511];
        stale_ |= (entry & kPteWritable) != 0;
        entry &= ~u64{kPteWritable};
    }
    flush_now();
}

}  // namespace polyvisor
