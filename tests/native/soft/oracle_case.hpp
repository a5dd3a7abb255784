// One experiment: a CPU in user mode about to execute one instruction, and what became of it. The
// host's own CPU and the interpreter are given the same Case; their Outcomes must be equal.
#pragma once

#include <array>

#include "soft/optab.hpp"

namespace pvtest {

using polyvisor::u16;
using polyvisor::u32;
using polyvisor::u64;
using polyvisor::u8;

// Both sides have the same addresses mapped: code that can be executed, and data pages between
// holes.
inline constexpr u64 kCodeBase = 0x10000000;
inline constexpr u64 kCodeSize = 64 << 20;
inline constexpr u64 kCodeSlot = 64;  ///< every Case has its own bytes: no code is ever overwritten
inline constexpr u64 kDataBase = 0x20000000;
inline constexpr u64 kDataPages = 3;  ///< two that can be written, one that can only be read
inline constexpr u64 kDataSize = kDataPages * 4096;
inline constexpr u64 kWritableSize = 2 * 4096;

// 16-bit code runs in segments of 64 KiB that are not flat: one for data and stack, around the data
// pages, and one for each such piece of the code. On the host they are in the child's LDT.
inline constexpr u64 kSegmentSize = 0x10000;
inline constexpr u64 kData16Base = kDataBase - 0x4000;
inline constexpr unsigned kCode16Segments = kCodeSize / kSegmentSize;
inline constexpr u16 kData16Selector = 7;
inline constexpr u16 code16_selector(u64 code_address) {
    return static_cast<u16>((1 + (code_address - kCodeBase) / kSegmentSize) * 8 | 7);
}

/// What user-mode code sees of the CPU.
struct UserState {
    u64 gpr[16]{};
    u64 rip = 0;
    u64 rflags = 2;
    u64 fs_base = 0, gs_base = 0;
    alignas(64) u8 legacy[512]{};  ///< as FXSAVE64
    u8 ymm_high[16][16]{};
};

struct Case {
    polyvisor::soft::Op op{};
    polyvisor::soft::CodeSize size = polyvisor::soft::CodeSize::k64;
    polyvisor::soft::Insn insn;
    u8 code[15]{};
    u64 code_address = 0;    ///< linear
    u64 code_base = 0;       ///< of CS
    u64 data_base = 0;       ///< of DS, ES and SS
    u64 memory_address = 0;  ///< linear, of the ModRM operand
    UserState before;
    std::array<u8, kDataSize> data{};
};

struct Outcome {
    bool alive = true;  ///< false: the executor itself failed; `text` says how
    const char* text = "";
    int vector = -1;  ///< exception, or -1 when the instruction completed
    bool has_error = false;
    u32 error = 0;  ///< of the interpreter only: signals do not tell
    bool has_address = false;
    u64 address = 0;  ///< #PF
    UserState after;
    std::array<u8, kDataSize> data{};
};

// Exceptions that signals do not tell apart: #GP, #BR and #OF are all SIGSEGV without an address.
inline constexpr int kVectorGpLike = 13;

inline u16 read16(const u8* p) {
    return static_cast<u16>(p[0] | p[1] << 8);
}

// Places in `legacy` (SDM 1, 10.5.1).
inline constexpr unsigned kFcwAt = 0, kFswAt = 2, kFtwAt = 4, kFopAt = 6, kFipAt = 8, kFdpAt = 16,
                          kMxcsrAt = 24, kMxcsrMaskAt = 28, kStAt = 32, kXmmAt = 160;

}  // namespace pvtest
