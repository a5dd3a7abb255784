#include "process/signal_frame.hpp"

#include <cstring>

#include "process/supervisor.hpp"

namespace polyvisor::process {

namespace {

constexpr u64 kRedZone = 128;  // System V ABI for AMD64, 3.2.2
constexpr u64 kCanonicalEnd = bit(47);
// What sigreturn() sets of RFLAGS (FIX_EFLAGS): status, TF, DF, AC. (RF is not a program's here.)
constexpr u64 kRestoredFlags = 0x0004'0dd5;
constexpr u64 kClearedFlags = bit(8) | bit(10) | bit(16);  // for a handler: TF, DF, RF

// uc_flags (asm/ucontext.h): there is an XSAVE header; `ss` is there, and is to be restored.
constexpr u64 kHasXstate = 1, kHasSs = 2, kStrictSs = 4;

// struct sigcontext_64. The general registers stand in this order.
constexpr u8 kOrder[16] = {8,    9,    10,   11,   12,   13,   14,   15,
                           kRdi, kRsi, kRbp, kRbx, kRdx, kRax, kRcx, kRsp};
struct MachineContext {
    u64 gpr[16], rip, rflags;
    u16 cs, gs, fs, ss;
    u64 error, vector, old_mask, cr2, fpu, reserved[8];
};
struct UserContext {
    u64 flags, link;
    SignalStack stack;
    MachineContext machine;
    u64 mask;
};
struct Frame {
    u64 return_address;
    UserContext context;
    siginfo_t info;
};
static_assert(sizeof(MachineContext) == 256 && sizeof(UserContext) == 304 &&
              sizeof(siginfo_t) == 128 && sizeof(Frame) == 440);

// struct _fpx_sw_bytes: what Linux says of the area in the bytes of FXSAVE that are software's.
struct SoftwareBytes {
    u32 magic, whole_size;
    u64 components;
    u32 size, unused[7];
};
static_assert(sizeof(SoftwareBytes) == 48);
constexpr u32 kMagic = 0x4650'5853, kMagicEnd = 0x4650'5845;

// XSAVE's standard format (SDM 1, 10.5.1 and 13.4).
struct XsaveHeader {
    u64 present, compacted, reserved[6];
};
constexpr u64 kX87 = 1, kSse = 2, kAvx = 4;
constexpr std::size_t kControl = 0, kReservedAfterTags = 5, kMxcsr = 24, kMxcsrMask = 28;
constexpr std::size_t kSt = 32, kXmm = 160, kAfterXmm = 416, kSoftware = 464, kHeader = 512;
constexpr std::size_t kYmmHigh = 576, kMost = 832 + sizeof kMagicEnd;
constexpr u32 kMxcsrBits = 0xffff;

std::size_t area_size(u64 xcr0) {
    return xcr0 & kAvx ? 832 : xcr0 & kSse ? kYmmHigh : kHeader;
}

template <class T>
T read(const u8* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <class T>
void write(u8* to, const T& value) {
    std::memcpy(to, &value, sizeof value);
}

// Fills `area`: its size, with the magic number behind it.
std::size_t save_fpu(const FpuState& fpu, u64 xcr0, std::array<u8, kMost>& area) {
    area = {};
    std::memcpy(area.data(), fpu.legacy.data(), fpu.legacy.size());
    const std::size_t size = area_size(xcr0);
    if (size == kHeader) return size;
    XsaveHeader header{};
    header.present = kX87 | kSse;
    if ((xcr0 & kAvx) && fpu.ymm_high != FpuState{}.ymm_high) {
        header.present |= kAvx;
        std::memcpy(area.data() + kYmmHigh, fpu.ymm_high.data(), sizeof fpu.ymm_high);
    }
    write(area.data() + kHeader, header);
    SoftwareBytes software{};
    software.magic = kMagic;
    software.whole_size = static_cast<u32>(size + sizeof kMagicEnd);
    software.components = xcr0;
    software.size = static_cast<u32>(size);
    write(area.data() + kSoftware, software);
    write(area.data() + size, kMagicEnd);
    return size + sizeof kMagicEnd;
}

// What XRSTOR would make of it (SDM 1, 13.8), with the components in `wanted`; without a header
// (`extended` false) FXRSTOR. False: a general protection fault.
bool restore_fpu(const u8* area, u64 xcr0, u64 wanted, bool extended, FpuState& fpu) {
    u64 present = kX87 | kSse;
    if (extended) {
        const auto header = read<XsaveHeader>(area + kHeader);
        if ((header.present & ~xcr0) || header.compacted || header.reserved[0]) return false;
        present = header.present & wanted;
    }
    if (read<u32>(area + kMxcsr) & ~kMxcsrBits) return false;
    fpu = initial_fpu();
    u8* legacy = fpu.legacy.data();
    if (present & kX87) {
        std::memcpy(legacy + kControl, area + kControl, kMxcsr - kControl);
        legacy[kReservedAfterTags] = 0;
        for (std::size_t n = 0; n < 8; ++n) {
            std::memcpy(legacy + kSt + 16 * n, area + kSt + 16 * n, 10);
        }
    }
    if (wanted & (kSse | kAvx)) std::memcpy(legacy + kMxcsr, area + kMxcsr, sizeof(u32));
    if (present & kSse) std::memcpy(legacy + kXmm, area + kXmm, kAfterXmm - kXmm);
    if (present & kAvx) {
        std::memcpy(fpu.ymm_high.data(), area + kYmmHigh, sizeof fpu.ymm_high);
    }
    return true;
}

// As Linux's check_xstate_in_sigframe(): an area that says nothing of an extended one has FXSAVE's
// registers only, and the others get their initial values.
bool load_fpu(const AddressSpace& space, u64 address, u64 xcr0, FpuState& fpu) {
    if (address == 0) {
        fpu = initial_fpu();
        return true;
    }
    if (address % 64 != 0) return false;  // XRSTOR's own condition
    std::array<u8, kMost> area{};
    if (!space.copy_in(address, std::span(area).first(kHeader))) return false;
    const auto software = read<SoftwareBytes>(area.data() + kSoftware);
    const std::size_t size = software.size;
    bool extended = xcr0 != kX87 && software.magic == kMagic && size >= kYmmHigh &&
                    size <= area_size(xcr0) && size <= software.whole_size;
    if (extended) {
        const auto rest = std::span(area).subspan(kHeader, size + sizeof kMagicEnd - kHeader);
        if (!space.copy_in(address + kHeader, rest)) return false;
        extended = read<u32>(area.data() + size) == kMagicEnd;
    }
    u64 wanted = extended ? software.components & xcr0 : kX87 | kSse;
    // XRSTOR reads what the components need, whatever the header says of the size.
    if (extended && (wanted & kAvx) && size < 832 &&
        !space.copy_in(address + kYmmHigh, std::span(area).subspan(kYmmHigh, 256))) {
        return false;
    }
    return restore_fpu(area.data(), xcr0, wanted, extended, fpu);
}

}  // namespace

FpuState initial_fpu() {
    FpuState fpu;
    // All exceptions of both units masked, all registers empty.
    write(fpu.legacy.data() + kControl, u16{0x37f});
    write(fpu.legacy.data() + kMxcsr, u32{0x1f80});
    write(fpu.legacy.data() + kMxcsrMask, kMxcsrBits);
    return fpu;
}

u64 signal_frame_size(u64 xcr0) {
    constexpr u64 kAlignments = 63 + 15 + 8;
    return kRedZone + area_size(xcr0) + sizeof kMagicEnd + sizeof(Frame) + kAlignments;
}

bool push_signal_frame(AddressSpace& space, u64 xcr0, const SignalAction& action,
                       const siginfo_t& info, const SignalContext& context,
                       GeneralRegisters& registers) {
    if (!(action.flags & SignalAction::kRestorer) || action.handler >= kCanonicalEnd) return false;
    const GeneralRegisters& from = context.registers;
    const SignalStack& other = context.stack;
    u64 rsp = from.gpr[kRsp];
    bool on_other = other.busy(rsp);
    rsp -= kRedZone;
    if ((action.flags & SA_ONSTACK) && other.size != 0 && !other.busy(rsp)) {
        rsp = other.base + other.size;
        on_other = true;
    }
    std::array<u8, kMost> area;
    const std::size_t size = save_fpu(context.fpu, xcr0, area);
    const u64 fpu = align_down(rsp - size, 64);
    const u64 at = align_down(fpu - sizeof(Frame), 16) - 8;  // as after a CALL
    // Not below the alternate stack, where somebody else's memory is.
    if (on_other && !other.holds(at)) return false;

    Frame frame{};
    frame.return_address = action.restorer;
    frame.context.flags = kHasSs | kStrictSs | (xcr0 != kX87 ? kHasXstate : 0);
    frame.context.stack = other;
    frame.context.mask = context.mask;
    MachineContext& machine = frame.context.machine;
    for (std::size_t n = 0; n < 16; ++n) machine.gpr[n] = from.gpr[kOrder[n]];
    machine.rip = from.rip;
    machine.rflags = from.rflags;
    machine.cs = Supervisor::kUserCode;
    machine.ss = Supervisor::kUserData;
    machine.error = context.fault.error;
    machine.vector = context.fault.vector;
    machine.cr2 = context.fault.address;
    machine.old_mask = context.mask;
    machine.fpu = fpu;
    frame.info = info;
    if (!space.copy_out(fpu, std::span(area).first(size)) || !space.store(at, frame)) return false;

    registers = from;
    registers.gpr[kRdi] = static_cast<u64>(info.si_signo);
    registers.gpr[kRsi] = at + offsetof(Frame, info);
    registers.gpr[kRdx] = at + offsetof(Frame, context);
    registers.gpr[kRax] = 0;  // no vector registers, for a handler without a prototype
    registers.gpr[kRsp] = at;
    registers.rip = action.handler;
    registers.rflags &= ~kClearedFlags;
    return true;
}

bool pop_signal_frame(const AddressSpace& space, u64 xcr0, const GeneralRegisters& registers,
                      SignalContext& context) {
    Frame frame;
    // The handler's return has taken the return address.
    if (!space.load(registers.gpr[kRsp] - sizeof frame.return_address, frame)) return false;
    const MachineContext& machine = frame.context.machine;
    if (machine.rip >= kCanonicalEnd || (machine.cs | 3) != Supervisor::kUserCode ||
        (machine.ss | 3) != Supervisor::kUserData ||
        !load_fpu(space, machine.fpu, xcr0, context.fpu)) {
        return false;
    }
    for (std::size_t n = 0; n < 16; ++n) context.registers.gpr[kOrder[n]] = machine.gpr[n];
    context.registers.rip = machine.rip;
    context.registers.rflags =
        (registers.rflags & ~kRestoredFlags) | (machine.rflags & kRestoredFlags);
    context.mask = frame.context.mask;
    context.stack = frame.context.stack;
    return true;
}

}  // namespace polyvisor::process
