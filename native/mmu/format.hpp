// Paging-structure formats as data. A format says how many levels there are, where each level's
// index stands in the linear address and at which levels an entry may map a page; mmu/walker.cpp
// turns each into a walk of its own at compile time. AMD's NPT has the ordinary formats. Adding a
// format is adding a table here and, when its permission bits differ, a walk with a rights rule of
// its own, as mmu/ept.cpp is for EPT.
#pragma once

#include <array>

#include "base/types.hpp"

namespace polyvisor {

/// Which translation the control registers select (SDM 3A, 4.1.1).
enum class PagingMode : u8 { kNone, k32Bit, kPae, k4Level, k5Level };

/// The mode that CR0, CR4 and EFER select.
constexpr PagingMode paging_mode_of(u64 cr0, u64 cr4, u64 efer) {
    if (!(cr0 & bit(31))) return PagingMode::kNone;
    if (!(cr4 & bit(5))) return PagingMode::k32Bit;
    if (!(efer & bit(10))) return PagingMode::kPae;
    return cr4 & bit(12) ? PagingMode::k5Level : PagingMode::k4Level;
}

/// Bits of a paging-structure entry that all formats share.
enum PageEntryBits : u64 {
    kPtePresent = bit(0),
    kPteWritable = bit(1),
    kPteUser = bit(2),
    kPteWriteThrough = bit(3),
    kPteCacheDisable = bit(4),
    kPteAccessed = bit(5),
    kPteDirty = bit(6),
    kPtePageSize = bit(7),  ///< not the last level: the entry maps a page
    kPteGlobal = bit(8),
    kPtePatSmall = bit(7),   ///< PAT bit of a last-level entry
    kPtePatLarge = bit(12),  ///< PAT bit of a larger page
    kPteNoExecute = bit(63),
};

/// The address in an 8-byte entry, before MAXPHYADDR is looked at.
inline constexpr u64 kPteAddress = 0x000f'ffff'ffff'f000;

/// Bits of an EPT paging-structure entry (SDM 3C, 29.3.2).
enum EptEntryBits : u64 {
    kEpteRead = bit(0),
    kEpteWrite = bit(1),
    kEpteExecute = bit(2),  ///< with mode-based execute: of supervisor-mode linear addresses
    kEpteIgnorePat = bit(6),
    kEptePageSize = bit(7),
    kEpteAccessed = bit(8),
    kEpteDirty = bit(9),
    kEpteUserExecute = bit(10),
};

/// When the page-size bit of a non-last level maps a page; otherwise the bit is reserved or
/// ignored.
enum class LargePage : u8 {
    kReserved,  ///< never: the bit must be clear
    kAlways,
    kIfPse,  ///< with CR4.PSE; otherwise the bit is ignored
    kIf2Mb,  ///< when 2 MB pages are supported (EPT); otherwise the bit is reserved
    kIf1Gb,  ///< when 1 GB pages are supported; otherwise the bit is reserved
};

struct PagingLevel {
    u8 shift;  ///< of the index in the linear address, and log2 of the page an entry maps
    u8 index_bits;
    LargePage large;  ///< kReserved for the last level, whose bit 7 is PAT
};

struct PagingFormat {
    u8 levels;               ///< levels walked in memory
    u8 entry_bytes;          ///< 4 or 8
    bool pdpte_registers;    ///< PAE: the first step is one of the four PDPTE registers
    bool ignores_high_bits;  ///< bits 62:52 are software's (IA-32e); in PAE they are reserved
    bool protection_keys;
    std::array<PagingLevel, 5> level;  ///< from the root
};

inline constexpr PagingFormat kFormat32Bit{
    2, 4, false, false, false, {{{22, 10, LargePage::kIfPse}, {12, 10, LargePage::kReserved}}}};
inline constexpr PagingFormat kFormatPae{
    2, 8, true, false, false, {{{21, 9, LargePage::kAlways}, {12, 9, LargePage::kReserved}}}};
inline constexpr PagingFormat kFormat4Level{4,
                                            8,
                                            false,
                                            true,
                                            true,
                                            {{{39, 9, LargePage::kReserved},
                                              {30, 9, LargePage::kIf1Gb},
                                              {21, 9, LargePage::kAlways},
                                              {12, 9, LargePage::kReserved}}}};
inline constexpr PagingFormat kFormat5Level{5,
                                            8,
                                            false,
                                            true,
                                            true,
                                            {{{48, 9, LargePage::kReserved},
                                              {39, 9, LargePage::kReserved},
                                              {30, 9, LargePage::kIf1Gb},
                                              {21, 9, LargePage::kAlways},
                                              {12, 9, LargePage::kReserved}}}};

inline constexpr PagingFormat kFormatEpt4{4,
                                          8,
                                          false,
                                          true,
                                          false,
                                          {{{39, 9, LargePage::kReserved},
                                            {30, 9, LargePage::kIf1Gb},
                                            {21, 9, LargePage::kIf2Mb},
                                            {12, 9, LargePage::kReserved}}}};
inline constexpr PagingFormat kFormatEpt5{5,
                                          8,
                                          false,
                                          true,
                                          false,
                                          {{{48, 9, LargePage::kReserved},
                                            {39, 9, LargePage::kReserved},
                                            {30, 9, LargePage::kIf1Gb},
                                            {21, 9, LargePage::kIf2Mb},
                                            {12, 9, LargePage::kReserved}}}};

}  // namespace polyvisor
