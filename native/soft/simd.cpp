// What the SIMD operations share, and the lists of them.
#include "soft/simd.hpp"

#include "soft/bindings.hpp"
#include "soft/simd_exceptions.hpp"

namespace polyvisor::soft {

namespace {

constexpr u64 kCr4OsXmmExcept = bit(10);

const OpBinding kMmxOps[] = {
#define PV_OP(id, ...) bind<Op::id, rows::id>(),
#include "soft/optab_mmx.inc"
};
const OpBinding kSseOps[] = {
#include "soft/optab_sse.inc"
};
const OpBinding kAvxOps[] = {
#include "soft/optab_avx.inc"
};
const OpBinding kFpuStateOps[] = {
#include "soft/optab_fpu_state.inc"
#undef PV_OP
};

}  // namespace

std::span<const OpBinding> mmx_ops() {
    return kMmxOps;
}
std::span<const OpBinding> sse_ops() {
    return kSseOps;
}
std::span<const OpBinding> avx_ops() {
    return kAvxOps;
}
std::span<const OpBinding> fpu_state_ops() {
    return kFpuStateOps;
}

const u8* memory_source(VcpuFrame& f, const Insn& i, u64 ea, u8* buffer, unsigned size) {
    u64 linear;
    if (!linear_address(f, i.segment, ea, size, false, linear)) return nullptr;
    u64 entry = (linear >> kPageShift) & 255;
    if (PV_LIKELY(linear + f.tlb_now->neg_r[entry] <= kPageSize - size)) {
        return reinterpret_cast<const u8*>(linear + f.tlb_now->addend[entry]);
    }
    bool done = read_linear(f, linear, buffer, size, Privilege::kCurrent, i.segment);
    return done ? buffer : nullptr;
}

void set_guest_mxcsr(VcpuFrame& f, u32 value) {
    bool masks_change = ((f.mxcsr ^ value) & kMxcsrMasks) != 0;
    f.mxcsr = value;
    set_host_mxcsr(value | kMxcsrMasks);
    if (masks_change) update_mode(f);
}

bool run_checked_simd(VcpuFrame& f, const Insn& i, u64 ea, Operation operation) {
    constexpr u32 kBeforeComputation = 7;  // invalid, denormal, divide by zero
    // The destination is an XMM/YMM, general or MMX register, or the status flags. (VCVTPS2PH's may
    // be memory: it looks at the flags itself before it stores.)
    Bytes<32> ymm = as<32>(f.ymm[i.reg]);
    Bytes<16> mmx = as<16>(f.x87.reg[i.reg & 7]);
    u64 gpr = f.gpr[i.reg];
    u16 oszapc = f.oszapc, x87_status = f.x87.status;
    u8 x87_tags = f.x87.tags;

    u32 before = host_mxcsr();
    set_host_mxcsr(before & ~kMxcsrFlags);
    bool done = operation(f, i, ea);
    u32 flags = host_mxcsr() & kMxcsrFlags;
    if (!done) {
        set_host_mxcsr(before);
        return false;
    }
    u32 raised = flags & ~(f.mxcsr >> 7);
    if (raised == 0) {
        set_host_mxcsr(before | flags);
        return true;
    }
    as<32>(f.ymm[i.reg]) = ymm;
    as<16>(f.x87.reg[i.reg & 7]) = mmx;
    f.gpr[i.reg] = gpr;
    f.oszapc = oszapc;
    f.x87.status = x87_status;
    f.x87.tags = x87_tags;
    if (raised & kBeforeComputation) flags &= kBeforeComputation;
    set_host_mxcsr(before | flags);
    return raise(f, f.cr4 & kCr4OsXmmExcept ? kXm : kUd);
}

}  // namespace polyvisor::soft
