// The x87 stack in the frame, and how its operations run on the host's FPU.
//
// An operation loads its operands as 80-bit values into the (empty) host FPU, under the guest's
// control word, does the host's own instruction, and takes back the result and the status word. The
// host's exceptions may be unmasked meanwhile: between the instruction and FNCLEX only non-waiting
// instructions run, so the host never takes #MF, and results that depend on masks come out exact.
// Afterwards the host's FPU is empty again, its control word the default and its flags clear.
//
// Stack faults (IE + SF) are found here, before the host is asked: the responses are few and
// regular.
//
// Unmasked exceptions set ES and B; #MF is raised by the next waiting instruction (the framework
// does that for kFpu rows). CR0.NE = 0, external error reporting by FERR# and IRQ 13, is not
// implemented: such guests get #MF as well. FCS and FDS read as zero, as on CPUs that deprecate
// them; FIP, FDP and FOP are recorded by every instruction that is not control (SDM 1, 8.1.8).
#pragma once

#include <span>

#include "soft/ops.hpp"

namespace polyvisor::soft::x87 {

enum StatusWord : u16 {
    kInvalid = 1,
    kDenormal = 2,
    kZeroDivide = 4,
    kOverflow = 8,
    kUnderflow = 16,
    kPrecision = 32,
    kExceptions = 0x3f,
    kStackFault = 0x40,
    kSummary = 0x80,
    kC0 = 0x100,
    kC1 = 0x200,
    kC2 = 0x400,
    kC3 = 0x4000,
    kTop = 0x3800,
    kBusy = 0x8000,
    kCodes = kC0 | kC1 | kC2 | kC3,
};
inline constexpr u16 kDefaultControl = 0x37f;

/// One 80-bit value as it stands in X87State::reg.
struct alignas(16) Register {
    u64 significand;
    u16 exponent;  ///< and sign
};
static_assert(sizeof(Register) == sizeof(X87State::reg[0]));
inline constexpr Register kIndefinite{0xc000000000000000, 0xffff};

inline unsigned top(const VcpuFrame& f) {
    return (f.x87.status >> 11) & 7;
}
inline void set_top(VcpuFrame& f, unsigned n) {
    f.x87.status = static_cast<u16>((f.x87.status & ~kTop) | (n & 7) << 11);
}
inline unsigned physical(const VcpuFrame& f, unsigned i) {
    return (top(f) + i) & 7;
}
inline Register& st(VcpuFrame& f, unsigned i) {
    return *reinterpret_cast<Register*>(f.x87.reg[physical(f, i)]);
}
inline bool empty(const VcpuFrame& f, unsigned i) {
    return !(f.x87.tags >> physical(f, i) & 1);
}
inline void fill(VcpuFrame& f, unsigned i) {
    f.x87.tags |= static_cast<u8>(1 << physical(f, i));
}
inline void pop(VcpuFrame& f) {
    f.x87.tags &= static_cast<u8>(~(1 << top(f)));
    set_top(f, top(f) + 1);
}
/// Makes room for a value; the caller has checked that ST(7) is empty.
inline Register& push(VcpuFrame& f) {
    set_top(f, top(f) - 1);
    fill(f, 0);
    return st(f, 0);
}

/// ES and B follow from flags and masks.
inline void update_summary(VcpuFrame& f) {
    bool pending = f.x87.status & ~f.x87.control & kExceptions;
    f.x87.status =
        static_cast<u16>((f.x87.status & ~(kSummary | kBusy)) | (pending ? kSummary | kBusy : 0));
}
/// Exceptions among `raised` (host's status word) that the guest does not mask.
inline unsigned unmasked(const VcpuFrame& f, u16 raised) {
    return raised & ~f.x87.control & kExceptions;
}
/// Takes over exceptions and those condition codes in `codes` from the host's status word.
inline void commit_status(VcpuFrame& f, u16 host, unsigned codes) {
    f.x87.status = static_cast<u16>((f.x87.status & ~codes) | (host & (codes | kExceptions)));
    if (PV_UNLIKELY(unmasked(f, host))) f.x87.status |= kSummary | kBusy;
}
/// Raises #IS: C1 tells overflow from underflow. True: masked, the caller gives the masked
/// response.
[[gnu::cold]] inline bool stack_fault(VcpuFrame& f, bool overflow) {
    f.x87.status =
        static_cast<u16>((f.x87.status & ~kC1) | kInvalid | kStackFault | (overflow ? kC1 : 0));
    update_summary(f);
    return f.x87.control & kInvalid;
}
/// FIP, FDP and FOP of an instruction that is not control. Linear in real and virtual-8086 mode,
/// whose FNSAVE formats want it so.
inline void note(VcpuFrame& f, const Insn& i, u64 ea) {
    bool linear = !f.protected_mode();
    f.x87.ip = current_ip(f, i) + (linear ? f.seg[kCs].base : 0);
    if (i.has_mem) f.x87.dp = ea + (linear ? f.seg[i.segment].base : 0);
    f.x87.opcode = static_cast<u16>((i.opcode & 7) << 8 | i.modrm);
    f.x87.cs = f.x87.ds = 0;
}

/// #AC for operands whose alignment is not their size: 8 for 80-bit values, 2 or 4 for the
/// environment (SDM 3A, table 6-7). Comes before #PF, after what makes the address itself wrong.
inline bool aligned(VcpuFrame& f, const Insn& i, u64 ea, u32 size, u32 alignment, bool write) {
    if (PV_LIKELY(!(f.mode & kModeAlignCheck))) return true;
    u64 linear;
    if (!linear_address(f, i.segment, ea, size, write, linear)) return false;
    unsigned width = f.cr4 & bit(12) ? 57 : 48;
    bool canonical = !f.long64() || static_cast<u64>(sign_extend(linear, width)) == linear;
    return !canonical || (linear & (alignment - 1)) == 0 || raise(f, kAcFault, 0);
}
/// An operation that does not store after all (unmasked exception) still needs a writable operand.
[[gnu::cold]] inline bool probe(VcpuFrame& f, const Insn& i, u64 ea, u32 size) {
    u64 linear;
    return linear_address(f, i.segment, ea, size, true, linear) &&
           probe_write_linear(f, linear, size, Privilege::kCurrent, i.segment);
}

// Pieces of the asm statements. They use AX and need operands [cw] (the guest's control word) and
// [def] (the default one) in memory, and [sw] as "=&a".
#define PV_X87_ENTER "cmpw $0x37f, %[cw]\n\tje 1f\n\tfldcw %[cw]\n1:\t"
#define PV_X87_STATUS "\n\tfnstsw %%ax\n\ttestb $0x3f, %%al\n\tjz 2f\n\tfnclex\n2:\t"
#define PV_X87_LEAVE "\n\tcmpw $0x37f, %[cw]\n\tje 3f\n\tfldcw %[def]\n3:"
#define PV_X87_CONTROL [cw] "m"(f.x87.control), [def] "m"(kDefaultControl)

std::span<const OpBinding>
arithmetic_ops();                          // ops_x87_arithmetic.cpp: FADD..FDIVR, FSQRT, FPREM, ...
std::span<const OpBinding> compare_ops();  // ops_x87_compare.cpp: FCOM*, FTST, FXAM, FCMOV
std::span<const OpBinding> data_ops();  // ops_x87_data.cpp: FLD, FST, FILD, FBLD, FXCH, constants
std::span<const OpBinding> control_ops();  // ops_x87_control.cpp: FLDCW, FNSAVE, FNINIT, FFREE, ...

}  // namespace polyvisor::soft::x87
