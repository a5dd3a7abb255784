// The pool of shadow tables: who is who, links between them, eviction.
#include <algorithm>

#include "mmu/shadow.hpp"

namespace polyvisor {
namespace {

/// Whether something that was allowed by `old` is not by `now`.
bool loses(u64 old, u64 now) {
    constexpr u64 kKey = u64{15} << 59;
    if (!(old & kPtePresent)) return false;
    return !(now & kPtePresent) || ((old ^ now) & (kPteAddress | kPtePageSize)) ||
           (old & ~now & kPteWritable) || (now & ~old & (kPteNoExecute | kKey));
}

}  // namespace

void ShadowMmu::flush_now() {
    if (!stale_) return;
    stale_ = false;
    host_.flush();
}

// ---- guest tables

ShadowMmu::GuestTable* ShadowMmu::table_of(u64 gpa) {
    u32 n = by_gfn_.find(gpa >> kPageShift);
    return n == kNone ? nullptr : &guest_tables_[n];
}

const ShadowMmu::GuestTable* ShadowMmu::table_of(u64 gpa) const {
    u32 n = by_gfn_.find(gpa >> kPageShift);
    return n == kNone ? nullptr : &guest_tables_[n];
}

void ShadowMmu::count_tables(u64 gpa, int change) {
    for (unsigned level : {2, 3}) {
        u64 key = rmap_key(gpa, level);
        u32 count = tables_within_.find(key);
        count = (count == kNone ? 0 : count) + static_cast<u32>(change);
        if (count == 0) {
            tables_within_.erase(key);
        } else {
            tables_within_.set(key, count);
        }
    }
}

u32 ShadowMmu::find_table(u64 gpa, u8 level, u8 quadrant, u8 rights, u16 role) const {
    const GuestTable* table = table_of(gpa);
    for (u32 id = table ? table->first : kNone; id != kNone; id = pages_[id].next) {
        const Page& p = pages_[id];
        if (p.level == level && p.quadrant == quadrant && p.rights == rights && p.role == role) {
            return id;
        }
    }
    return kNone;
}

u32 ShadowMmu::get_table(u64 gpa, u8 level, u8 quadrant, u8 rights, u16 role) {
    gpa = align_down(gpa, kPageSize);
    u32 id = find_table(gpa, level, quadrant, rights, role);
    if (id != kNone) return id;
    id = allocate(Kind::kTable, gpa, level, rights, role);
    pages_[id].quadrant = quadrant;
    u32 slot = by_gfn_.find(gpa >> kPageShift);
    bool added = slot == kNone;
    if (added) {
        if (free_tables_.empty()) {
            slot = static_cast<u32>(guest_tables_.size());
            guest_tables_.emplace_back();
        } else {
            slot = free_tables_.back();
            free_tables_.pop_back();
        }
        guest_tables_[slot] = {.gfn = gpa >> kPageShift};
        by_gfn_.set(gpa >> kPageShift, slot);
        count_tables(gpa, 1);
    }
    GuestTable& guest = guest_tables_[slot];
    pages_[id].next = guest.first;
    guest.first = id;
    guest.upper += level > 1;
    if (added) {  // tracked, and nothing in a TLB lets it be written, before its entries are read
        protect_page(gpa);
        host_.tracked(gpa, true);
        flush_now();
    } else if (guest.unsync && level > 1) {  // only last levels may be out of date
        sync_table(guest);
    }
    return id;
}

void ShadowMmu::zap_table(u64 gpa) {
    for (const GuestTable* guest; (guest = table_of(gpa));) zap_page(guest->first);
}

// ---- other tables

u64 ShadowMmu::untracked_key(Kind kind, u64 gpa, u8 level, u8 rights, u16 role) {
    // kDirect: page number (40 bits), rights; kTop: CR3 in 27 bits, role. Above them which, and
    // level.
    u64 what = kind == Kind::kDirect ? (gpa >> kPageShift) << 3 | rights
                                     : bit(58) | (gpa >> 5) << 16 | role;
    return what | u64{level} << 59;
}

u32 ShadowMmu::get_untracked(Kind kind, u64 gpa, u8 level, u8 rights, u16 role, bool create) {
    u64 key = untracked_key(kind, gpa, level, rights, role);
    u32 id = untracked_.find(key);
    if (id == kNone && create) {
        id = allocate(kind, gpa, level, rights, role);
        untracked_.set(key, id);
    }
    return id;
}

// ---- entries

void ShadowMmu::drop_entry(u32 id, unsigned index) {
    u64& entry = table(id)[index];
    if (!(entry & kPtePresent)) return;
    if (is_leaf(entry, pages_[id].level)) {
        rmap_remove(leaf_gpa(id, index), pages_[id].level, entry_id(id, index));
    } else {
        auto& parents = pages_[page_at(entry & kPteAddress)].parents;
        auto here = std::find(parents.begin(), parents.end(), entry_id(id, index));
        *here = parents.back();
        parents.pop_back();
    }
    entry = 0;
    --pages_[id].present;
    stale_ = true;
}

void ShadowMmu::set_leaf(u32 id, unsigned index, u64 now, u64 raw) {
    u64& entry = table(id)[index];
    u64 old = entry;
    bool stale = stale_;
    drop_entry(id, index);
    stale_ = stale || loses(old, now);
    copy(id, index) = raw;
    if (!(now & kPtePresent)) return;
    entry = now;
    ++pages_[id].present;
    rmap_add(leaf_gpa(id, index), pages_[id].level, entry_id(id, index));
}

void ShadowMmu::link(u32 parent, unsigned index, u32 child, u64 raw) {
    u64& entry = table(parent)[index];
    u64 level = pages_[parent].level;
    if ((entry & kPtePresent) && !is_leaf(entry, static_cast<unsigned>(level)) &&
        page_at(entry & kPteAddress) == child) {
        copy(parent, index) = raw;
        return;
    }
    drop_entry(parent, index);
    copy(parent, index) = raw;
    // What the child remembers was right where it was linked before. Here nothing may be old.
    const Page& below = pages_[child];
    if (below.present != 0 && below.kind == Kind::kTable) {
        if (below.level > 1) {
            sync_all(false);
        } else if (table_of(below.gpa)->unsync) {
            resync_page(child);
        }
    }
    entry = address_of(child) | kPtePresent | kPteWritable | kPteUser;
    ++pages_[parent].present;
    pages_[child].parents.push_back(entry_id(parent, index));
}

// ---- the pool

u32 ShadowMmu::allocate(Kind kind, u64 gpa, u8 level, u8 rights, u16 role) {
    u32 id = free_;  // make_room() saw to it that there is one
    Page& page = pages_[id];
    free_ = page.next;
    ++used_;
    page.kind = kind;
    page.level = level;
    page.quadrant = 0;
    page.rights = rights;
    page.role = role;
    page.used = true;
    page.gpa = gpa;
    page.next = kNone;
    return id;
}

void ShadowMmu::zap_page(u32 id) {
    Page& page = pages_[id];
    while (!page.parents.empty()) {
        u32 entry = page.parents.back();
        drop_entry(entry >> 9, entry & 511);
    }
    for (unsigned n = 0; n < 512 && page.present != 0; ++n) drop_entry(id, n);
    for (u32& root : roots_) {
        if (root == id) root = kNone;
    }
    stale_ = true;
    if (page.kind == Kind::kTable) {
        u64 gfn = page.gpa >> kPageShift;
        u32 slot = by_gfn_.find(gfn);
        GuestTable& guest = guest_tables_[slot];
        u32* at = &guest.first;
        while (*at != id) at = &pages_[*at].next;
        *at = page.next;
        guest.upper -= page.level > 1;
        if (guest.first == kNone) {
            count_tables(page.gpa, -1);
            by_gfn_.erase(gfn);
            free_tables_.push_back(slot);
            if (!guest.unsync) host_.tracked(page.gpa, false);
        }
    } else {
        untracked_.erase(untracked_key(page.kind, page.gpa, page.level, page.rights, page.role));
    }
    page.kind = Kind::kFree;
    page.next = free_;
    free_ = id;
    --used_;
}

/// Whether the table was walked through since the last time this was asked: hardware has set an
/// accessed bit above it, or a fault has used it.
bool ShadowMmu::recently_used(u32 id) {
    Page& page = pages_[id];
    bool used = page.used;
    page.used = false;
    for (u32 parent : page.parents) {
        u64& entry = table(parent >> 9)[parent & 511];
        used |= (entry & kPteAccessed) != 0;
        entry &= ~u64{kPteAccessed};
    }
    return used;
}

/// Evicts, by the clock algorithm, until so many are free.
void ShadowMmu::make_room(u32 wanted) {
    u32 spared = 0;
    while (pages_.size() - used_ < wanted) {
        u32 id = clock_;
        clock_ = (clock_ + 1) % static_cast<u32>(pages_.size());
        if (pages_[id].kind == Kind::kFree) continue;
        if (spared < 2 * pages_.size() && recently_used(id)) {
            ++spared;
            continue;
        }
        if (std::find(std::begin(roots_), std::end(roots_), id) != std::end(roots_)) continue;
        zap_page(id);
        ++stats_.evictions;
    }
    flush_now();
}

std::string ShadowMmu::check() const {
    u32 used = 0;
    u64 leaves = 0, links = 0, parents = 0, listed = 0;
    auto at = [](u32 id, unsigned n) { return std::to_string(id) + "[" + std::to_string(n) + "]"; };
    for (u32 id = 0; id < pages_.size(); ++id) {
        const Page& page = pages_[id];
        if (page.kind == Kind::kFree) continue;
        ++used;
        parents += page.parents.size();
        u32 present = 0;
        for (unsigned n = 0; n < 512; ++n) {
            u64 entry = table(id)[n];
            if (!(entry & kPtePresent)) continue;
            ++present;
            if (!is_leaf(entry, page.level)) {
                const Page& child = pages_[page_at(entry & kPteAddress)];
                ++links;
                if (child.kind == Kind::kFree) return at(id, n) + " leads to a freed table";
                if (child.level + 1 != page.level) return at(id, n) + " skips a level";
                continue;
            }
            ++leaves;
            u64 gpa = leaf_gpa(id, n);
            u32 node = rmap_.find(rmap_key(gpa, page.level));
            while (node != kNone && nodes_[node].entry != entry_id(id, n)) node = nodes_[node].next;
            if (node == kNone) return at(id, n) + " is not in the reverse map";
            if (!(entry & kPteWritable)) continue;
            if (page.level == 1 ? is_synced_table(gpa)
                                : tables_within_.find(rmap_key(gpa, page.level)) != kNone) {
                return at(id, n) + " lets a tracked table be written";
            }
        }
        if (present != page.present) return "table " + std::to_string(id) + " counts wrongly";
        if (page.kind != Kind::kTable) continue;
        if (find_table(page.gpa, page.level, page.quadrant, page.rights, page.role) != id) {
            return "table " + std::to_string(id) + " cannot be found";
        }
    }
    for (u32 node = free_nodes_; node != kNone; node = nodes_[node].next) ++listed;
    if (used != used_) return "the pool counts wrongly";
    if (links != parents) return "links and parents differ";
    if (leaves + listed != nodes_.size()) return "the reverse map has too much";
    return "";
}

}  // namespace polyvisor
