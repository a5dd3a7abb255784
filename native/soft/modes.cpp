// VcpuFrame::mode and the TLB context, from the control registers and segments they depend on.
#include "soft/descriptors.hpp"

namespace polyvisor::soft {
namespace {

/// A data segment whose checks can never fail in 32-bit code.
bool flat(const Segment& s) {
    constexpr u32 kMask = bit(16) | bit(7) | bit(4) | 0xe;  // unusable, P, S, type
    constexpr u32 kFlat = bit(7) | bit(4) | 2;              // present, writable, expand-up
    return (s.attributes & kMask) == kFlat && s.base == 0 && s.limit == 0xffffffff;
}

}  // namespace

void update_mode(VcpuFrame& f) {
    const u64 cr0 = f.cr0, cr4 = f.cr4;
    const bool vm86 = f.rflags_rest & kFlagVm;
    const Segment& cs = f.seg[kCs];
    u32 mode = u32{f.cpl} << 3;
    if (f.msr.efer & bit(10)) {
        mode |= kModeLongActive;
        mode |= static_cast<u32>(cs.l() ? CodeSize::k64 : cs.db() ? CodeSize::k32 : CodeSize::k16);
    } else {
        mode |= static_cast<u32>(cs.db() ? CodeSize::k32 : CodeSize::k16);
    }
    if ((mode & kModeCodeSize) != static_cast<u32>(CodeSize::k64)) {
        if (f.seg[kSs].db()) mode |= kModeStack32;
        if (!flat(f.seg[kDs]) || !flat(f.seg[kSs]) || !flat(f.seg[kEs])) mode |= kModeSegCheck;
    }
    if (vm86) {
        mode |= kModeVm86;
    } else if (cr0 & 1) {
        mode |= kModeProtected;
    }

    if (PV_UNLIKELY(cr0 & (bit(2) | bit(3)))) {
        mode |= kModeFpuTrap;
        if (cr0 & bit(2)) mode |= kModeEm | kModeSseUd;
        if (cr0 & bit(3)) mode |= kModeTs;
    }
    if (!(cr4 & bit(9))) mode |= kModeSseUd;
    if (!(cr4 & bit(18)) || (f.xcr0 & 6) != 6 || !(mode & kModeProtected)) mode |= kModeAvxUd;
    if (PV_UNLIKELY((f.mxcsr & 0x1f80) != 0x1f80)) mode |= kModeFpException;
    if (PV_UNLIKELY((f.rflags_rest & kFlagT) || f.breakpoints() || f.host_step)) mode |= kModeStep;

    TlbContext context;
    if (f.cpl == 3) {
        context = kTlbUser;
        if (PV_UNLIKELY((cr0 & bit(18)) && (f.rflags_rest & kFlagAc))) {
            mode |= kModeAlignCheck;
            context = kTlbNone;
        }
    } else {
        context = (cr4 & bit(21)) && !(f.rflags_rest & kFlagAc) ? kTlbSupervisor : kTlbSupervisorAc;
    }
    const bool long64 = (mode & kModeCodeSize) == static_cast<u32>(CodeSize::k64);
    const u64 base = long64 ? 0 : cs.base;
    const u32 limit = long64 ? 0xffffffff : cs.limit;
    if (PV_UNLIKELY(base != f.code_base || limit != f.code_limit)) {
        f.code_base = base;
        f.code_limit = limit;
        ++f.epoch;  // the same IP may be other code now, or beyond the limit
    }
    f.mode = mode;
    f.tlb_now = &f.tlb[context];
}

}  // namespace polyvisor::soft
