#include "mmu/ranges.hpp"

#include <algorithm>
#include <cstring>

namespace polyvisor {

namespace {

constexpr u64 kAddressField = 0x000f'ffff'ffff'f000;
constexpr u64 kRights = kPteWritable | kPteUser;

// What a table outside memory reads as.
alignas(8) constexpr auto kOnes = [] {
    std::array<u8, kPageSize> ones{};
    for (u8& byte : ones) byte = 0xff;
    return ones;
}();

const PagingFormat* format_of(PagingMode mode) {
    switch (mode) {
        case PagingMode::k32Bit:
            return &kFormat32Bit;
        case PagingMode::kPae:
            return &kFormatPae;
        case PagingMode::k4Level:
            return &kFormat4Level;
        case PagingMode::k5Level:
            return &kFormat5Level;
        case PagingMode::kNone:
            break;
    }
    return nullptr;
}

// A page of the second dimension, or the hole that the address is in.
struct Second {
    bool mapped = false;
    u64 physical = 0;
    u8 shift = 12;
    bool writable = false, executable = false, user_executable = false;
};

// No rights are asked for, as by a probing walk.
struct WalkSecond {
    TableReader& tables;
    u64 gpa;

    Second operator()(const EptState& ept) const {
        Second result;
        WalkTrace trace;
        EptResult r = walk_ept_trace(tables, ept, gpa, {.read = false}, trace);
        result.mapped = r.ok();
        result.physical = r.hpa;
        result.shift = r.ok() ? r.shift : hole(trace);
        result.writable = r.writable;
        result.executable = r.executable;
        result.user_executable = r.user_executable;
        return result;
    }

    Second operator()(const NptState& npt) const {
        Second result;
        const PagingMode mode = npt.paging.mode;
        const unsigned width = mode == PagingMode::k5Level   ? 57
                               : mode == PagingMode::k4Level ? 48
                                                             : 32;
        if (gpa >> width != 0) return result;
        WalkTrace trace;
        WalkResult r = walk_trace(tables, probing(npt.paging), gpa, {}, trace);
        result.mapped = r.ok();
        result.physical = r.page.gpa;
        result.shift = r.ok() ? r.page.shift : hole(trace);
        // The guest's accesses are user-mode ones there (APM 2, 15.25.5).
        result.writable = r.page.user && r.page.writable;
        result.executable = result.user_executable = r.page.user && !r.page.nx;
        return result;
    }

    // Log2 of what the entry that maps nothing would have mapped.
    static u8 hole(const WalkTrace& trace) {
        return trace.count != 0 ? trace.steps[trace.count - 1].shift : u8{12};
    }
};

}  // namespace

MappingScanner::MappingScanner(const AddressSpace& space, u64 start, u64 last)
    : space_(space), paging_(space.paging()), tables_(space.memory()) {
    const PagingFormat* format = format_of(paging_.mode);
    width_ = paging_.mode == PagingMode::k4Level   ? 48
             : paging_.mode == PagingMode::k5Level ? 57
                                                   : 32;
    const u64 mask = bit(width_) - 1;
    // Canonical addresses in their order are the linear ones in theirs; the hole has none.
    if (width_ == 32) {
        if (start > mask) return;
        last = std::min(last, mask);
    } else {
        const u64 low_end = bit(width_ - 1), high_start = ~u64{0} << (width_ - 1);
        if (start >= low_end && start < high_start) start = high_start;
        if (last >= low_end && last < high_start) last = low_end - 1;
    }
    if (start > last) return;
    start_ = position_ = start & mask;
    last_ = last & mask;
    if (format == nullptr) {  // no paging: one to one
        leaf_ = {start_, start_, last_ - start_ + 1, 12, true, true, true, false};
        have_leaf_ = true;
        return;
    }
    entry_bytes_ = format->entry_bytes;
    if (entry_bytes_ == 8) {
        reserved_ = paging_.reserved | (format->ignores_high_bits ? 0 : u64{0x7ff0'0000'0000'0000});
    }
    if (format->pdpte_registers) levels_[level_count_++] = {30, LargePage::kReserved, false, true};
    for (unsigned n = 0; n < format->levels; ++n) {
        levels_[level_count_++] = {format->level[n].shift, format->level[n].large,
                                   n + 1 == format->levels, false};
    }
    if (format->pdpte_registers) {
        enter(reinterpret_cast<const u8*>(paging_.pdpte), 0, kRights, false);
    } else {
        u64 root = paging_.cr3 & (entry_bytes_ == 4 ? u64{0xffff'f000} : kAddressField);
        if (const u8* table = table_at(root)) enter(table, 0, kRights, false);
    }
}

u64 MappingScanner::widen(u64 linear) const {
    return width_ == 32 ? linear : static_cast<u64>(sign_extend(linear, width_));
}

// The host address of a table; nullptr when the second dimension has no such page.
const u8* MappingScanner::table_at(u64 address) {
    address &= paging_.a20_mask;
    if (space_.second()) {
        Second second = std::visit(WalkSecond{tables_, address}, *space_.second());
        if (!second.mapped) return nullptr;
        address = second.physical;
    }
    const u8* host = tables_.entry(address);
    return host != nullptr ? host : kOnes.data();
}

// Goes one level down, to the entries that are between the two addresses.
void MappingScanner::enter(const u8* table, u64 base, u64 rights, bool no_execute) {
    const Level& level = levels_[static_cast<unsigned>(++depth_)];
    const u32 entries = level.register_ ? 4 : static_cast<u32>(kPageSize / entry_bytes_);
    const u64 end = base + (u64{entries} << level.shift) - 1;
    Frame& frame = frames_[static_cast<unsigned>(depth_)];
    frame = {table, base, 0, entries - 1, rights, no_execute};
    if (start_ > base) frame.index = static_cast<u32>((start_ - base) >> level.shift);
    if (last_ < end) frame.last = static_cast<u32>((last_ - base) >> level.shift);
}

// Makes the page that an entry maps the next one; false when it maps none.
bool MappingScanner::take(const Frame& frame, u64 entry, u64 linear) {
    const Level& level = levels_[static_cast<unsigned>(depth_)];
    const u8 shift = level.shift;
    u64 address = entry & kAddressField;
    if (entry_bytes_ == 4) {
        address = entry & 0xffff'f000;
        if (shift == 22) address = (entry & 0xffc0'0000) | bits(entry, 20, 13) << 32;  // PSE-36
    }
    const u64 rights = frame.rights & entry;
    const u64 size = bit(shift);
    leaf_.gva = linear;
    leaf_.physical = (address & ~(size - 1)) & paging_.a20_mask;
    leaf_.size = size;
    leaf_.shift = shift;
    leaf_.user = rights & kPteUser;
    leaf_.writable = rights & kPteWritable;
    leaf_.executable =
        !paging_.nxe || entry_bytes_ == 4 || !(frame.no_execute || (entry & kPteNoExecute));
    leaf_.global = paging_.pge && (entry & kPteGlobal);
    if (linear < start_) {
        leaf_.physical += start_ - linear;
        leaf_.size -= start_ - linear;
        leaf_.gva = start_;
    }
    if (leaf_.size - 1 > last_ - leaf_.gva) leaf_.size = last_ - leaf_.gva + 1;
    have_leaf_ = true;
    return true;
}

// The part of the page at hand that is one page of the second dimension, too.
bool MappingScanner::next_piece(MappedRange& page) {
    if (!space_.second()) {
        page = leaf_;
        page.gva = widen(leaf_.gva);
        position_ = leaf_.gva + leaf_.size;
        have_leaf_ = false;
        return true;
    }
    while (have_leaf_) {
        if (budget == 0) {
            exhausted_ = true;
            return false;
        }
        --budget;
        Second second = std::visit(WalkSecond{tables_, leaf_.physical}, *space_.second());
        const u64 whole = bit(second.shift);
        const u64 size = std::min(leaf_.size, whole - (leaf_.physical & (whole - 1)));
        page = leaf_;
        page.gva = widen(leaf_.gva);
        page.physical = second.physical;
        page.size = size;
        page.shift = std::min(leaf_.shift, second.shift);
        page.writable &= second.writable;
        page.executable &= leaf_.user ? second.user_executable : second.executable;
        leaf_.gva += size;
        leaf_.physical += size;
        leaf_.size -= size;
        position_ = leaf_.gva;
        have_leaf_ = leaf_.size != 0;
        if (second.mapped) return true;
    }
    return false;
}

bool MappingScanner::next(MappedRange& page) {
    exhausted_ = false;
    if (have_leaf_ && next_piece(page)) return true;
    if (exhausted_) return false;
    while (depth_ >= 0) {
        Frame& frame = frames_[static_cast<unsigned>(depth_)];
        const Level& level = levels_[static_cast<unsigned>(depth_)];
        if (frame.index > frame.last) {
            --depth_;
            continue;
        }
        if (budget == 0) {
            position_ = std::max(start_, frame.base + (u64{frame.index} << level.shift));
            exhausted_ = true;
            return false;
        }
        --budget;
        const u32 index = frame.index++;
        // Another CPU may be writing: one access of the entry's own size, as the processor's.
        const u64 entry = entry_bytes_ == 4
                              ? __atomic_load_n(reinterpret_cast<const u32*>(frame.table) + index,
                                                __ATOMIC_RELAXED)
                              : __atomic_load_n(reinterpret_cast<const u64*>(frame.table) + index,
                                                __ATOMIC_RELAXED);
        if (!(entry & kPtePresent)) continue;
        const u64 linear = frame.base + (u64{index} << level.shift);
        if (level.register_) {
            const u8* table = table_at(entry & paging_.physical_mask & kAddressField);
            if (table != nullptr) enter(table, linear, kRights, false);
            continue;
        }
        if (entry & reserved_) continue;
        bool leaf = level.leaf;
        if (!leaf && (entry & kPtePageSize)) {
            if (level.large == LargePage::kReserved) continue;
            if (level.large == LargePage::kIf1Gb && !paging_.pages_1gb) continue;
            leaf = level.large != LargePage::kIfPse || paging_.pse;
            const u64 below = entry_bytes_ == 4 ? paging_.reserved_large32
                                                : (bit(level.shift) - 1) & ~u64{0x1fff};
            if (leaf && (entry & below)) continue;
        }
        if (leaf) {
            take(frame, entry, linear);
            if (next_piece(page)) return true;
            if (exhausted_) return false;
            continue;
        }
        const u8* table = table_at(entry & (entry_bytes_ == 4 ? 0xffff'f000 : kAddressField));
        if (table != nullptr) {
            enter(table, linear, frame.rights & entry, frame.no_execute || (entry & kPteNoExecute));
        }
    }
    position_ = last_;
    return false;
}

RangeList list_ranges(const AddressSpace& space, const RangeOptions& options) {
    RangeList list;
    MappingScanner scanner(space, options.start, options.last);
    scanner.budget = options.budget;
    const bool physical = options.join == RangeOptions::Join::kPhysical;
    for (MappedRange page; scanner.next(page);) {
        if (!list.ranges.empty()) {
            MappedRange& last = list.ranges.back();
            if (last.gva + last.size == page.gva && last.same_rights(page) &&
                (!physical ||
                 (last.physical + last.size == page.physical && last.shift == page.shift))) {
                last.size += page.size;
                last.shift = std::min(last.shift, page.shift);
                continue;
            }
        }
        if (list.ranges.size() >= options.limit) {
            list.truncated = true;
            list.next = page.gva;
            return list;
        }
        list.ranges.push_back(page);
    }
    if (scanner.exhausted()) {
        list.truncated = true;
        list.next = scanner.position();
    }
    return list;
}

}  // namespace polyvisor
