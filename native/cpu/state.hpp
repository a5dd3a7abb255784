// The architectural state of one x86-64 CPU as plain data: what save() of either engine returns and
// restore() takes. A snapshot is this struct (plus the chips'). No engine-internal field belongs
// here.
#pragma once

#include <array>

#include "base/types.hpp"

namespace polyvisor {

struct CpuidPolicy;

/// A segment register with its hidden part. `attributes` is the descriptor's bits 40..55 with the
/// limit nibble zero: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15; bit 16: unusable
/// (null).
struct Segment {
    u64 base = 0;
    u32 limit = 0xffff;
    u32 attributes = 0;
    u16 selector = 0;

    u8 type() const { return attributes & 15; }
    bool s() const { return attributes & bit(4); }
    u8 dpl() const { return (attributes >> 5) & 3; }
    bool present() const { return attributes & bit(7); }
    bool l() const { return attributes & bit(13); }
    bool db() const { return attributes & bit(14); }
    bool g() const { return attributes & bit(15); }
    bool unusable() const { return attributes & bit(16); }
    bool operator==(const Segment&) const = default;
};

enum SegmentIndex : u8 { kEs, kCs, kSs, kDs, kFs, kGs, kSegmentCount };
enum GprIndex : u8 { kRax, kRcx, kRdx, kRbx, kRsp, kRbp, kRsi, kRdi, kR8 = 8, kR15 = 15 };

struct DescriptorTable {
    u64 base = 0;
    u16 limit = 0xffff;
    bool operator==(const DescriptorTable&) const = default;
};

/// x87, SSE and AVX registers; the layout of `legacy` is FXSAVE64's (SDM 1, 10.5.1). What is no
/// register reads as 0 there, and MXCSR_MASK as 0xffff.
struct FpuState {
    std::array<u8, 512> legacy{};
    std::array<std::array<u8, 16>, 16> ymm_high{};
    bool operator==(const FpuState&) const = default;
};

/// Model-specific registers that are the CPU's own. The APIC's are in its own State.
struct MsrState {
    u64 efer = 0;
    u64 star = 0, lstar = 0, cstar = 0, sfmask = 0;
    u64 kernel_gs_base = 0;
    u64 sysenter_cs = 0, sysenter_esp = 0, sysenter_eip = 0;
    u64 pat = 0x0007040600070406;
    u64 tsc_offset = 0;  ///< guest TSC = clock's TSC + this
    u64 tsc_adjust = 0;
    u64 tsc_aux = 0;
    u64 misc_enable = 1;
    u64 mtrr_def_type = 0;
    std::array<u64, 11> mtrr_fixed{};
    std::array<u64, 16> mtrr_variable{};  ///< base, mask pairs
    u64 xss = 0;
    u64 spec_ctrl = 0;
    u64 kvm_wall_clock = 0;   ///< MSR 4b564d00: address last written
    u64 kvm_system_time = 0;  ///< MSR 4b564d01: address of this CPU's time page, bit 0: enabled
    bool operator==(const MsrState&) const = default;
};

/// An event that the CPU has begun to deliver, or must before its next instruction: an engine that
/// is stopped in between keeps it here (SDM 3C, 27.2.4). CR2 and DR6 have what an exception puts
/// there. With a software event RIP is still at its instruction, so that an engine may as well run
/// that again (KVM does).
struct InFlightEvent {
    enum class Kind : u8 {
        kNone,
        kInterrupt,  ///< external, already acknowledged
        kNmi,
        kException,          ///< a fault, trap or abort at the present RIP
        kSoftwareInterrupt,  ///< INT n
        kSoftwareException,  ///< INT3, INTO
    };
    Kind kind = Kind::kNone;
    u8 vector = 0;
    bool has_error_code = false;
    u8 length = 0;  ///< of the instruction, for software events
    u32 error_code = 0;
    bool operator==(const InFlightEvent&) const = default;
};

enum class Activity : u8 { kRunning, kHalted, kWaitForSipi, kShutdown };

struct CpuState {
    std::array<u64, 16> gpr{};
    u64 rip = 0xfff0;
    u64 rflags = 2;
    std::array<Segment, 6> segments{};
    Segment ldtr, tr;
    DescriptorTable gdtr, idtr;
    u64 cr0 = 0x60000010, cr2 = 0, cr3 = 0, cr4 = 0, xcr0 = 1;
    std::array<u64, 4> dr{};
    u64 dr6 = 0xffff0ff0, dr7 = 0x400;
    MsrState msr;
    FpuState fpu;
    Activity activity = Activity::kRunning;
    bool interrupt_shadow = false;  ///< after STI or a load of SS: no interrupt for one instruction
    bool nmi_blocked = false;       ///< from NMI delivery to IRET
    bool nmi_pending = false;
    InFlightEvent event;
    u64 instructions = 0;  ///< retired since reset (soft engine; 0 where it is not known)
    bool operator==(const CpuState&) const = default;
};

/// The registers that who serves a guest's traps looks at.
struct GeneralRegisters {
    std::array<u64, 16> gpr{};
    u64 rip = 0;
    u64 rflags = 2;
    bool operator==(const GeneralRegisters&) const = default;
};

/// The state after power-on (SDM 3A, 9.1.1): real mode at f000:fff0. `bootstrap` false: an
/// application processor, waiting for a start-up IPI.
CpuState reset_state(bool bootstrap);

/// The current privilege level: SS's DPL (SDM 3C, 24.4.1), also while CS has a selector that was
/// loaded in real mode.
u8 privilege_level(const CpuState& state);

/// Throws StateError naming the field when the state is one no CPU can be in (SDM 3C, 26.3.1, as
/// far as it can be checked without the CPUID policy).
void validate(const CpuState& state);
/// The same, also for what needs a feature that CPUs of this policy lack.
void validate(const CpuState& state, const CpuidPolicy& policy);

}  // namespace polyvisor
