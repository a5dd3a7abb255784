// A tagged software TLB: what a processor caches of translations, with process-context identifiers
// (PCID), global pages and pages of 4 KiB, 2 MiB and 1 GiB (SDM 3A, 4.10).
//
//     u64 address;
//     if (!tlb.lookup(gva, pcid, TlbUse::kUserRead, address)) { ... walk, then
//         tlb.insert(gva, pcid, {.address = page, .shift = 12, .allow = tlb_allow(...)}); }
//
// What an entry leads to is the owner's affair: guest-physical or host addresses below 2^52. So are
// rights: an entry says for which uses it is good, and a use that it is not good for misses.
//
// It is a cache: any entry may vanish at any time, and flushes may drop more than they must, never
// less. One thread uses it.
#pragma once

#include <array>

#include "base/types.hpp"

namespace polyvisor {

/// Kinds of access that rights differ for.
enum class TlbUse : u8 {
    kUserRead,
    kUserWrite,
    kUserFetch,
    kSupervisorRead,
    kSupervisorWrite,
    kSupervisorFetch,
    kSupervisorReadAc,  ///< with EFLAGS.AC set, for SMAP
    kSupervisorWriteAc,
};
inline constexpr unsigned kTlbUses = 8;

template <class... Uses>
constexpr u8 tlb_allow(Uses... uses) {
    return static_cast<u8>((0u | ... | (1u << static_cast<unsigned>(uses))));
}
inline constexpr u8 kTlbAllowAll = 0xff;

struct TlbPage {
    u64 address = 0;  ///< of the page's first byte
    u8 shift = 12;    ///< log2 of the page: 12, 21, 22 or 30
    u8 allow = kTlbAllowAll;
    bool global = false;  ///< good for every PCID
};

class Tlb {
  public:
    /// Where `gva` is, when that is cached and good for the use. `pcid` has 12 bits.
    bool lookup(u64 gva, u16 pcid, TlbUse use, u64& address) const {
        const u64 good = bit(kAllowShift + static_cast<unsigned>(use));
        const Entry* e = &small_[gva >> 12 & (kSmall - 1)];
        if (PV_LIKELY(hits(*e, tag_of(gva, pcid, 12), good))) return found(*e, gva, 12, address);
        e = &large_[gva >> 21 & (kLarge - 1)];
        if (PV_LIKELY(hits(*e, tag_of(gva, pcid, 21), good))) return found(*e, gva, 21, address);
        if (!(large_used_ & kUses1g)) return false;
        e = &huge_[gva >> 30 & (kHuge - 1)];
        return hits(*e, tag_of(gva, pcid, 30), good) && found(*e, gva, 30, address);
    }

    /// Adds a translation, in place of what is there for the same page. Pages of 4 MiB (shift 22)
    /// are kept as the half that `gva` is in.
    void insert(u64 gva, u16 pcid, const TlbPage& page) {
        bool quad = page.shift == 22;
        u8 shift = quad ? 21 : page.shift;
        u64 address = quad ? page.address + (gva & bit(21)) : page.address;
        if (shift == 21) large_used_ |= kUses2m;
        if (shift == 30) large_used_ |= kUses1g;
        place_of(gva, shift) = {tag_of(gva, pcid, shift), (address & kAddress) |
                                                              u64{page.allow} << kAllowShift |
                                                              (page.global ? 0 : kOnePcid)};
    }

    /// MOV to CR4 that changes PGE, INVPCID type 2.
    void flush_all() {
        flush_if([](const Entry&) { return true; });
        large_used_ = 0;
    }
    /// MOV to CR3 without the no-flush bit, INVPCID type 1: the PCID's, not the global ones.
    void flush_non_global(u16 pcid) {
        flush_if([pcid](const Entry& e) { return !is_global(e) && (e.tag & kPcid) == pcid; });
    }
    /// INVPCID type 3: all but the global ones.
    void flush_non_global() {
        flush_if([](const Entry& e) { return !is_global(e); });
    }
    /// Everything of the PCID, and the global ones, which it uses too.
    void flush_pcid(u16 pcid) {
        flush_if([pcid](const Entry& e) { return is_global(e) || (e.tag & kPcid) == pcid; });
    }
    /// INVLPG: the page of `gva`, whatever its size, of the PCID and global.
    void flush_page(u16 pcid, u64 gva) {
        flush_one(gva, pcid, 12);
        if (large_used_ & kUses2m) {  // both halves, in case that they are one page of 4 MiB
            flush_one(gva, pcid, 21);
            flush_one(gva ^ bit(21), pcid, 21);
        }
        if (large_used_ & kUses1g) flush_one(gva, pcid, 30);
    }
    /// INVPCID type 0: the page of the PCID; global ones may stay.
    void flush_page_non_global(u16 pcid, u64 gva) { flush_page(pcid, gva); }

  private:
    // Direct-mapped: with two ways, which of them it is would be mispredicted half the time, and
    // looking at both costs more than a second way saves.
    //
    // tag: page number and, in the 12 bits that a page address leaves free, PCID.
    // value: address in 51:12, TlbUse bits in 59:52, and bit 63 unless the page is global. An
    // invalid entry is good for no use.
    struct Entry {
        u64 tag, value;
    };
    static constexpr unsigned kSmall = 1024, kLarge = 64, kHuge = 8;
    static constexpr unsigned kAllowShift = 52;
    static constexpr u64 kAddress = 0x000f'ffff'ffff'f000, kPcid = 0xfff, kOnePcid = bit(63);
    enum LargeUsed : u8 { kUses2m = 1, kUses1g = 2 };

    static u64 tag_of(u64 gva, u16 pcid, unsigned shift) { return (gva >> shift << shift) | pcid; }
    static bool is_global(const Entry& e) { return !(e.value & kOnePcid); }
    /// How the entry's page differs from the tag's: 0 is not at all. Global ones have any PCID.
    static u64 difference(const Entry& e, u64 tag) {
        u64 compared = static_cast<u64>(static_cast<s64>(e.value) >> 63) | ~kPcid;
        return (e.tag ^ tag) & compared;
    }
    static bool hits(const Entry& e, u64 tag, u64 good) {
        return (difference(e, tag) | (~e.value & good)) == 0;
    }
    static bool found(const Entry& e, u64 gva, unsigned shift, u64& address) {
        address = (e.value & kAddress) + (gva & (bit(shift) - 1));
        return true;
    }
    Entry& place_of(u64 gva, unsigned shift) {
        if (shift == 12) return small_[gva >> 12 & (kSmall - 1)];
        return shift == 21 ? large_[gva >> 21 & (kLarge - 1)] : huge_[gva >> 30 & (kHuge - 1)];
    }
    void flush_one(u64 gva, u16 pcid, unsigned shift) {
        Entry& e = place_of(gva, shift);
        if (difference(e, tag_of(gva, pcid, shift)) == 0) e = {};
    }
    template <class Which>
    void flush_if(Which which) {
        auto flush = [which](auto& entries) {
            for (Entry& e : entries) {
                if (which(e)) e = {};
            }
        };
        flush(small_);
        if (large_used_ & kUses2m) flush(large_);
        if (large_used_ & kUses1g) flush(huge_);
    }

    std::array<Entry, kSmall> small_{};
    std::array<Entry, kLarge> large_{};
    std::array<Entry, kHuge> huge_{};
    u8 large_used_ = 0;
};

}  // namespace polyvisor
