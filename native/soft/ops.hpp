// How an operation of the instruction set is written.
//
//   bool add_with_hat(VcpuFrame& f, const Insn& i, u64 ea);
//
// It does the whole of one instruction and returns true; or it changes nothing that the
// architecture does not let a faulting instruction change, calls raise(...) and returns false (all
// raise functions return false: `return raise_gp(f);`). `ea` is the effective address (offset in
// i.segment, wrapped to the address size) when i.has_mem, else 0. Memory is reached with
// load()/store() below, which do segmentation, paging, MMIO and page crossing.
//
// What the framework has done before: feature and mode checks of the table row (kNo64, kCpl0, kFpu
// #NM/#UD, pending #MF for kFpu/kMmx rows, alignment of kAligned rows, LOCK legality), so
// operations do not repeat them. RIP: for rows without kEndsBlock, f.rip is stale and must not be
// used (use next_ip()). For rows with kEndsBlock, f.rip is already the next instruction's; the
// operation may change it (near branches: write f.rip, truncated to the operand size, after
// checking it against CS.limit or for canonicality). When it returns false, the framework sets
// f.rip back to the instruction, unless fault.trap is set.
//
// Each file of operations ends with its list: `const OpBinding kStringOps[] = {bind<Op::X, f>(),
// ...}`, declared in soft/bindings.hpp. A test checks that every row has exactly one operation.
#pragma once

#include <cstring>

#include "soft/frame.hpp"
#include "soft/optab.hpp"

namespace polyvisor::soft {

using Operation = bool (*)(VcpuFrame& f, const Insn& i, u64 ea);

struct OpBinding {
    Op op;
    Operation operation;
};

template <Op op, Operation operation>
constexpr OpBinding bind() {
    return {op, operation};
}

// --- Faults -------------------------------------------------------------------------------------

[[gnu::cold]] bool raise(VcpuFrame& f, u8 vector);
[[gnu::cold]] bool raise(VcpuFrame& f, u8 vector, u32 error);
[[gnu::cold]] inline bool raise_ud(VcpuFrame& f) {
    return raise(f, kUd);
}
[[gnu::cold]] inline bool raise_gp(VcpuFrame& f, u32 error = 0) {
    return raise(f, kGp, error);
}
/// A trap-like exception (INT3, INTO, single step): f.rip is what gets pushed.
[[gnu::cold]] bool raise_trap(VcpuFrame& f, u8 vector);

/// For repeated instructions: the registers say how far it came; it goes on at the same RIP after
/// pending interrupts have been looked at.
inline bool restart(VcpuFrame& f) {
    f.fault.pending = Pending::kRestart;
    return false;
}

// --- Memory -------------------------------------------------------------------------------------

/// How a linear access is made.
enum class Privilege : u8 {
    kCurrent,     ///< explicit access at CPL (with SMAP/AC)
    kSupervisor,  ///< implicit supervisor access: descriptor tables, TSS, IDT, inner stacks (SDM
                  ///< 3A 4.6.1)
    kUser,        ///< as CPL 3
};

/// Linear address of [ea, ea+size) in segment `seg` after all segment checks; false: raised
/// #GP/#SS. In 64-bit mode checks nothing but adds FS/GS bases (canonicality is checked by the
/// access itself).
bool segmented_address(VcpuFrame& f, u8 seg, u64 ea, u32 size, bool write, u64& linear);
inline bool linear_address(VcpuFrame& f, u8 seg, u64 ea, u32 size, bool write, u64& linear) {
    if (PV_LIKELY(f.long64())) {
        linear = seg < kFs ? ea : ea + f.seg[seg].base;
        return true;
    }
    return segmented_address(f, seg, ea, size, write, linear);
}

/// Any size up to 4096 bytes, any alignment, any page crossing, MMIO. False: raised. A store that
/// crosses pages checks both before it changes the first. `seg` is for choosing #SS over #GP on
/// non-canonical addresses.
bool read_linear(VcpuFrame& f, u64 linear, void* into, u32 size, Privilege privilege, u8 seg = kDs);
bool write_linear(VcpuFrame& f, u64 linear, const void* from, u32 size, Privilege privilege,
                  u8 seg = kDs);
/// Checks that a write of `size` bytes would succeed (sets A/D bits); false: raised.
bool probe_write_linear(VcpuFrame& f, u64 linear, u32 size, Privilege privilege, u8 seg = kDs);
/// Host address of [linear, +size) for a locked or repeated access, when that is wholly inside one
/// page of RAM that may be written without traps (made so if need be: code of the page is dropped);
/// nullptr with f.fault.pending == kNone when it must be done with read/write_linear (MMIO,
/// crossing), nullptr with a fault pending when it faults.
u8* writable_host(VcpuFrame& f, u64 linear, u32 size, Privilege privilege, u8 seg = kDs);
/// Same for reading.
const u8* readable_host(VcpuFrame& f, u64 linear, u32 size, Privilege privilege, u8 seg = kDs);

/// Translates for an explicit data access and caches that, when the page may be cached; false:
/// raised.
bool fill_tlb(VcpuFrame& f, u64 linear, bool write, u8 seg);

/// The ModRM operand of the instruction: T is any trivially copyable type of the right size.
template <class T>
inline bool load(VcpuFrame& f, const Insn& i, u64 ea, T& value) {
    u64 linear;
    if (!linear_address(f, i.segment, ea, sizeof(T), false, linear)) return false;
    u64 n = (linear >> 12) & 255;
    u64 offset = linear + f.tlb_now->neg_r[n];
    if (PV_LIKELY(offset <= 4096 - sizeof(T))) {
        std::memcpy(&value, reinterpret_cast<const u8*>(linear + f.tlb_now->addend[n]), sizeof(T));
        return true;
    }
    return read_linear(f, linear, &value, sizeof(T), Privilege::kCurrent, i.segment);
}

template <class T>
inline bool store(VcpuFrame& f, const Insn& i, u64 ea, const T& value) {
    u64 linear;
    if (!linear_address(f, i.segment, ea, sizeof(T), true, linear)) return false;
    u64 n = (linear >> 12) & 255;
    u64 offset = linear + f.tlb_now->neg_w[n];
    if (PV_LIKELY(offset <= 4096 - sizeof(T))) {
        std::memcpy(reinterpret_cast<u8*>(linear + f.tlb_now->addend[n]), &value, sizeof(T));
        return true;
    }
    return write_linear(f, linear, &value, sizeof(T), Privilege::kCurrent, i.segment);
}

bool load_bytes(VcpuFrame& f, const Insn& i, u64 ea, void* into, u32 size);
bool store_bytes(VcpuFrame& f, const Insn& i, u64 ea, const void* from, u32 size);

/// Stack (SS:rSP of the current stack size); size 2, 4 or 8. pop() and push() change RSP only on
/// success.
bool push(VcpuFrame& f, u64 value, u32 size);
bool pop(VcpuFrame& f, u64& value, u32 size);

// --- Registers ----------------------------------------------------------------------------------

/// Byte register n as encoded: without REX, 4..7 are AH CH DH BH.
inline u8* reg8(VcpuFrame& f, const Insn& i, u8 n) {
    auto* bytes = reinterpret_cast<u8*>(f.gpr);
    return n >= 4 && n < 8 && !(i.prefixes & (kPrefixRex | kPrefixVex)) ? bytes + (n - 4) * 8 + 1
                                                                        : bytes + n * 8;
}
inline u64 read_reg(VcpuFrame& f, u8 n, unsigned size) {
    u64 value = f.gpr[n];
    return size == 8 ? value : value & ((u64{1} << (size * 8)) - 1);
}
/// 4-byte writes clear the upper half; 2-byte writes keep it. Not for byte registers.
inline void write_reg(VcpuFrame& f, u8 n, unsigned size, u64 value) {
    if (size == 8) {
        f.gpr[n] = value;
    } else if (size == 4) {
        f.gpr[n] = static_cast<u32>(value);
    } else {
        f.gpr[n] = (f.gpr[n] & ~u64{0xffff}) | (value & 0xffff);
    }
}

/// IP of the instruction being executed and of the next one (rows without kEndsBlock; others:
/// f.rip).
u64 current_ip(const VcpuFrame& f, const Insn& i);
u64 next_ip(const VcpuFrame& f, const Insn& i);

// --- Mode and translation state (soft/modes.cpp, soft/mmu.cpp)
// -------------------------------------

/// Recomputes mode, cpl-dependent TLB context and tlb_now after any change of CR0, CR4, EFER, XCR0,
/// MXCSR masks, CS, SS, DS, ES, RFLAGS.{TF,VM,AC,IOPL} or DR7.
void update_mode(VcpuFrame& f);
/// Drops every cached translation (CR3, CR0.{PG,WP}, CR4, EFER changes, A20).
void flush_tlb(VcpuFrame& f);
/// INVLPG.
void flush_page(VcpuFrame& f, u64 linear);

}  // namespace polyvisor::soft
