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

#include <algorithm>
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
    Tlb() { flush_all(); }

    /// Where `gva` is, when that is cached and good for the use. `pcid` has 12 bits.
    bool lookup(u64 gva, u16 pcid, TlbUse use, u64& address) const {
        u64 want = tag_of(gva, pcid, 12);
        const Entry* set = small_[gva >> 12 & (kSmallSets - 1)].data();
        if (PV_LIKELY(matches(set[0], want, use))) return found(set[0], gva, 12, address);
        if (matches(set[1], want, use)) return found(set[1], gva, 12, address);
        if (large_used_ == 0) return false;
        return lookup_large(gva, pcid, use, address);
    }

    /// Adds a translation, in place of what is there for the same page. Pages of 4 MiB (shift 22)
    /// are kept as the half that `gva` is in.
    void insert(u64 gva, u16 pcid, const TlbPage& page) {
        bool quad = page.shift == 22;
        u8 shift = quad ? 21 : page.shift;
        u64 address = quad ? page.address + (gva & bit(21)) : page.address;
        auto& set = set_of(gva, shift);
        if (shift == 21) large_used_ |= kUses2m;
        if (shift == 30) large_used_ |= kUses1g;
        Entry added{tag_of(gva, pcid, shift), (address & kAddress) |
                                                  u64{page.allow} << kAllowShift |
                                                  (page.global ? kGlobalShift : 0)};
        // The other way keeps what was used last, unless it is the same page.
        if (!same_page(set[0], added)) set[1] = set[0];
        if (same_page(set[1], added)) set[1] = kInvalid;
        set[0] = added;
    }

    /// MOV to CR4 that changes PGE, INVPCID type 2.
    void flush_all() {
        for_each_set([](auto& set) { set.fill(kInvalid); });
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
        flush_in(set_of(gva, 12), tag_of(gva, pcid, 12));
        if (large_used_ & kUses2m) {  // both halves, in case that they are one page of 4 MiB
            for (u64 half : {gva, gva ^ bit(21)}) {
                flush_in(set_of(half, 21), tag_of(half, pcid, 21));
            }
        }
        if (large_used_ & kUses1g) flush_in(set_of(gva, 30), tag_of(gva, pcid, 30));
    }
    /// INVPCID type 0: the page of the PCID; global ones may stay.
    void flush_page_non_global(u16 pcid, u64 gva) { flush_page(pcid, gva); }

  private:
    // tag: page number and, in the 12 bits that a page address leaves free, PCID.
    // value: address in 51:12, TlbUse bits in 59:52; bits 5:0 are how far the difference of two
    // tags is shifted before it must be zero: 12 makes a global entry blind to the PCID. An invalid
    // entry is good for nothing.
    struct Entry {
        u64 tag, value;
    };
    using Set = std::array<Entry, 2>;
    static constexpr unsigned kSmallSets = 512, kLargeSets = 32, kHugeSets = 4;
    static constexpr unsigned kAllowShift = 52;
    static constexpr u64 kAddress = 0x000f'ffff'ffff'f000, kPcid = 0xfff, kGlobalShift = 12;
    static constexpr Entry kInvalid{0, 0};
    enum LargeUsed : u8 { kUses2m = 1, kUses1g = 2 };

    static u64 tag_of(u64 gva, u16 pcid, unsigned shift) { return (gva >> shift << shift) | pcid; }
    static bool is_global(const Entry& e) { return e.value & kGlobalShift; }
    static bool matches(const Entry& e, u64 want, TlbUse use) {
        return ((e.tag ^ want) >> (e.value & 63)) == 0 &&
               (e.value >> (kAllowShift + static_cast<unsigned>(use)) & 1);
    }
    static bool found(const Entry& e, u64 gva, unsigned shift, u64& address) {
        address = (e.value & kAddress) + (gva & (bit(shift) - 1));
        return true;
    }
    static bool same_page(const Entry& a, const Entry& b) {
        return ((a.tag ^ b.tag) >> std::max(a.value & 63, b.value & 63)) == 0;
    }
    [[gnu::noinline]] bool lookup_large(u64 gva, u16 pcid, TlbUse use, u64& address) const {
        for (const Entry& e : large_[gva >> 21 & (kLargeSets - 1)]) {
            if (matches(e, tag_of(gva, pcid, 21), use)) return found(e, gva, 21, address);
        }
        if (!(large_used_ & kUses1g)) return false;
        for (const Entry& e : huge_[gva >> 30 & (kHugeSets - 1)]) {
            if (matches(e, tag_of(gva, pcid, 30), use)) return found(e, gva, 30, address);
        }
        return false;
    }
    Set& set_of(u64 gva, unsigned shift) {
        if (shift == 12) return small_[gva >> 12 & (kSmallSets - 1)];
        return shift == 21 ? large_[gva >> 21 & (kLargeSets - 1)]
                           : huge_[gva >> 30 & (kHugeSets - 1)];
    }
    static void flush_in(Set& set, u64 tag) {
        for (Entry& e : set) {
            if (((e.tag ^ tag) >> (e.value & 63)) == 0) e = kInvalid;
        }
    }
    template <class Do>
    void for_each_set(Do what) {
        for (Set& set : small_) what(set);
        if (large_used_ & kUses2m) {
            for (Set& set : large_) what(set);
        }
        if (large_used_ & kUses1g) {
            for (Set& set : huge_) what(set);
        }
    }
    template <class Which>
    void flush_if(Which which) {
        for_each_set([&](Set& set) {
            for (Entry& e : set) {
                if (which(e)) e = kInvalid;
            }
        });
    }

    std::array<Set, kSmallSets> small_{};
    std::array<Set, kLargeSets> large_{};
    std::array<Set, kHugeSets> huge_{};
    u8 large_used_ = 0;
};

}  // namespace polyvisor
