// Keeping shadow tables in step with the guest's.
//
// Every shadow entry remembers the guest entry that it was made from. "Resynchronizing" it is
// comparing the two: an entry of an upper table that differs is dropped, one of a last-level table
// is made anew from what the guest has now. A dropped entry comes back with the next fault.
#include <algorithm>

#include "mmu/shadow.hpp"
#include "mmu/walk_generic.hpp"

namespace polyvisor {
namespace {

constexpr u64 kSeen = kPteAccessed | kPteDirty;
/// Stores to a tracked page that nothing translates through meanwhile: it is no table any more.
constexpr u8 kFlood = 8;

}  // namespace

bool ShadowMmu::is_synced_table(u64 gpa) const {
    const GuestTable* table = table_of(gpa);
    return table && !table->unsync;
}

bool ShadowMmu::is_tracked(u64 gpa) const {
    return is_synced_table(gpa);
}

// What a last-level entry maps, as the walker would find it below entries of page.rights; nothing
// unless the guest has been told (A) that it is in use.
std::optional<Translation> ShadowMmu::translate_leaf(const Page& page, u64 raw) const {
    const PagingState& s = roles_[page.role].paging;
    if (!(raw & kPtePresent) || !(raw & kPteAccessed)) return {};
    bool bad = false, leaf, narrow = s.mode == PagingMode::k32Bit;
    bool pae = s.mode == PagingMode::kPae;
    if (pae) mmu_detail::judge_entry<kFormatPae>(s, 1, raw, bad, leaf);
    if (!pae && !narrow) mmu_detail::judge_entry<kFormat4Level>(s, 3, raw, bad, leaf);
    if (bad) return {};
    Translation t;
    t.gpa = raw & (narrow ? u64{0xffff'f000} : kPteAddress) & s.a20_mask;
    t.user = (page.rights & kUser) && (raw & kPteUser);
    t.writable = (page.rights & kWrite) && (raw & kPteWritable);
    t.nx = !narrow && s.nxe && ((page.rights & kNoExecute) || (raw & kPteNoExecute));
    t.dirty = raw & kPteDirty;
    if (!pae && !narrow) t.key = bits(raw, 62, 59);
    return t;
}

void ShadowMmu::resync_entry(u32 id, unsigned index) {
    if (!(table(id)[index] & kPtePresent)) return;
    const Page& page = pages_[id];
    u64 old = copy(id, index);
    u64 raw = read_entry(page, index);
    if (((raw ^ old) & ~(raw & kSeen)) == 0) return;  // the same, perhaps with A or D set by a walk
    if (page.level > 1) return drop_entry(id, index);
    auto t = translate_leaf(page, raw);
    auto place = t ? host_.host_page(t->gpa, false, kPageShift) : std::nullopt;
    if (!place) return drop_entry(id, index);
    u8 rights = leaf_rights(roles_[page.role], *t);
    if (!t->dirty || !place->writable || is_synced_table(t->gpa)) {
        rights &= static_cast<u8>(~kLeafWrite);
    }
    set_leaf(id, index, make_leaf(place->address, rights, 1), raw);
}

void ShadowMmu::resync_page(u32 id) {
    for (unsigned n = 0; n < 512 && pages_[id].present != 0; ++n) resync_entry(id, n);
}

// The entries made from bytes [offset, offset + size) of the guest's table, in all its shadows.
void ShadowMmu::resync_bytes(const GuestTable& table, unsigned offset, u64 size) {
    for (u32 id = table.first; id != kNone; id = pages_[id].next) {
        const Page& page = pages_[id];
        unsigned first = offset / 8, last = static_cast<unsigned>(offset + size - 1) / 8;
        if (roles_[page.role].paging.mode == PagingMode::k32Bit) {
            unsigned split = page.level == 1 ? 512 : 256;  // guest entries of a quadrant
            unsigned each = 512 / split;
            unsigned from = page.quadrant * split, n = offset / 4;
            last = static_cast<unsigned>(offset + size - 1) / 4;
            if (n >= from + split || last < from) continue;
            first = (n < from ? 0 : n - from) * each;
            last = (last >= from + split ? split - 1 : last - from) * each + each - 1;
        }
        for (unsigned n = first; n <= last; ++n) resync_entry(id, n);
    }
}

void ShadowMmu::write_tracked(u64 gpa, u64 size) {
    while (size != 0) {
        u64 here = std::min(size, kPageSize - (gpa & kPageMask));
        GuestTable* table = table_of(gpa);
        if (table && !table->unsync) {
            ++stats_.tracked_stores;
            if (++table->writes > kFlood) {
                ++stats_.floods;
                zap_table(gpa);
            } else {
                resync_bytes(*table, gpa & kPageMask, here);
            }
        }
        gpa += here;
        size -= here;
    }
    flush_now();
}

// Lets the guest write to a last-level table without telling.
void ShadowMmu::make_unsync(GuestTable& table) {
    ++stats_.unsyncs;
    table.unsync = true;
    unsync_.push_back(table.gfn);
    host_.tracked(table.gfn << kPageShift, false);
}

void ShadowMmu::sync_table(GuestTable& table) {
    ++stats_.syncs;
    table.unsync = false;
    protect_page(table.gfn << kPageShift);
    host_.tracked(table.gfn << kPageShift, true);
    flush_now();  // no store goes there unseen from here on: what is read now stays right
    for (u32 id = table.first; id != kNone; id = pages_[id].next) resync_page(id);
}

void ShadowMmu::sync_all(bool zap_empty) {
    std::vector<u64> gfns;
    gfns.swap(unsync_);
    for (u64 gfn : gfns) {
        GuestTable* table = table_of(gfn << kPageShift);
        if (!table || !table->unsync) continue;
        sync_table(*table);
        if (!zap_empty) continue;
        bool empty = true;
        for (u32 id = table->first; id != kNone; id = pages_[id].next) {
            empty &= pages_[id].present == 0;
        }
        if (empty) zap_table(gfn << kPageShift);  // a table no more: it need not be tracked
    }
    flush_now();
}

void ShadowMmu::flush() {
    sync_all(true);
}

void ShadowMmu::invlpg(u64 gva) {
    if (!is_canonical(paging_.mode, gva)) return;
    for (u32 page : roots_) {
        for (unsigned level = root_level(); page != kNone; --level) {
            unsigned index = gva >> level_shift(level) & 511;
            u64 entry = table(page)[index];
            if (!(entry & kPtePresent)) break;
            if (is_leaf(entry, level)) {
                // Upper levels are never out of date.
                const Page& p = pages_[page];
                if (level != 1 || p.kind != Kind::kTable) break;
                const GuestTable* guest = table_of(p.gpa);
                bool narrow = roles_[p.role].paging.mode == PagingMode::k32Bit;
                unsigned offset = narrow ? (p.quadrant * 512u + index) * 4 : index * 8;
                if (guest->unsync) resync_bytes(*guest, offset, narrow ? 4 : 8);
                break;
            }
            page = page_at(entry & kPteAddress);
        }
    }
    flush_now();
}

}  // namespace polyvisor
