// What the SIMD operations share, and the lists of them.
#include "soft/simd.hpp"

#include "soft/bindings.hpp"
#include "soft/simd_exceptions.hpp"

namespace polyvisor::soft {

namespace {

constexpr u64 kCr4OsXmmExcept = bit(10);
constexpr u32 kBeforeComputation = 7;  ///< invalid, denormal, divide by zero

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

namespace {

/// The unmasked ones among exception flags.
u32 unmasked(const VcpuFrame& f, u32 flags) {
    return flags & ~(f.mxcsr >> 7) & kMxcsrFlags;
}

/// What is reported of one step: an unmasked exception before the computation keeps it from
/// happening.
u32 reported(const VcpuFrame& f, u32 flags) {
    return unmasked(f, flags) & kBeforeComputation ? flags & kBeforeComputation : flags;
}

bool raise_simd(VcpuFrame& f, u32 before, u32 flags) {
    set_host_mxcsr(before | flags);
    return raise(f, f.cr4 & kCr4OsXmmExcept ? kXm : kUd);
}

bool dot_product(Op op) {
    return op == Op::DPPS_Vx_Wx_Ib || op == Op::VDPPS_Vdq_Hdq_Wdq_Ib ||
           op == Op::VDPPS_Vqq_Hqq_Wqq_Ib || op == Op::DPPD_Vx_Wx_Ib ||
           op == Op::VDPPD_Vdq_Hdq_Wdq_Ib;
}

/// DPPS and DPPD multiply, add pairs and add the sums, and an unmasked exception of one step hides
/// what later ones would report (SDM 2, DPPS). Gives the flags up to the first step that raised
/// one; 0 when none did. False: the operand faulted.
bool dot_product_exceptions(VcpuFrame& f, const Insn& i, u64 ea, u32& flags) {
    bool vex = i.prefixes & kPrefixVex;
    unsigned size = vex && i.vex_l ? 32 : 16;
    bool doubles = i.opcode == 0x41;
    alignas(32) u8 buffer[32], a[32]{}, b[32]{};
    const u8* src = i.has_mem ? memory_source(f, i, ea, buffer, size) : f.ymm[i.rm];
    if (src == nullptr) return false;
    unsigned width = doubles ? 8 : 4;
    for (unsigned at = 0; at < size; at += width) {
        if (!(i.imm >> (4 + at % 16 / width) & 1)) continue;  // not chosen: 0 * 0
        std::memcpy(a + at, f.ymm[vex ? i.vvvv : i.reg] + at, width);
        std::memcpy(b + at, src + at, width);
    }
    flags = 0;
    for (unsigned step = 0; step < (doubles ? 2 : 3); ++step) {
        set_host_mxcsr(host_mxcsr() & ~kMxcsrFlags);
        for (unsigned half = 0; half < size; half += 16) {
            auto& x = as<16>(a + half);
            auto& y = as<16>(b + half);
            if (step == 0 && doubles) {
                asm volatile("movaps %0, %%xmm0\n\tmulpd %1, %%xmm0\n\tmovaps %%xmm0, %0"
                             : "+m"(x)
                             : "m"(y)
                             : "xmm0");
            } else if (step == 0) {
                asm volatile("movaps %0, %%xmm0\n\tmulps %1, %%xmm0\n\tmovaps %%xmm0, %0"
                             : "+m"(x)
                             : "m"(y)
                             : "xmm0");
            } else if (doubles) {
                asm volatile("movaps %0, %%xmm0\n\thaddpd %%xmm0, %%xmm0\n\tmovq %%xmm0, %0"
                             : "+m"(x)
                             :
                             : "xmm0");
            } else {
                asm volatile("movaps %0, %%xmm0\n\thaddps %%xmm0, %%xmm0\n\tmovaps %%xmm0, %0"
                             : "+m"(x)
                             :
                             : "xmm0");
            }
        }
        u32 now = host_mxcsr() & kMxcsrFlags;
        flags |= reported(f, now);
        if (unmasked(f, now)) return true;
    }
    flags = 0;
    return true;
}

}  // namespace

bool run_checked_simd(VcpuFrame& f, const Insn& i, u64 ea, Operation operation) {
    // The destination is an XMM/YMM, general or MMX register, or the status flags. (VCVTPS2PH's may
    // be memory: it looks at the flags itself before it stores.)
    Bytes<32> ymm = as<32>(f.ymm[i.reg]);
    Bytes<16> mmx = as<16>(f.x87.reg[i.reg & 7]);
    u64 gpr = f.gpr[i.reg];
    u16 oszapc = f.oszapc, x87_status = f.x87.status;
    u8 x87_tags = f.x87.tags;

    u32 before = host_mxcsr();
    if (dot_product(i.op)) {
        u32 flags = 0;
        bool loaded = dot_product_exceptions(f, i, ea, flags);
        set_host_mxcsr(before);
        if (!loaded) return false;
        if (flags != 0) return raise_simd(f, before, flags);
    }
    set_host_mxcsr(before & ~kMxcsrFlags);
    bool done = operation(f, i, ea);
    u32 flags = host_mxcsr() & kMxcsrFlags;
    if (!done) {
        set_host_mxcsr(before);
        return false;
    }
    if (unmasked(f, flags) == 0) {
        set_host_mxcsr(before | flags);
        return true;
    }
    as<32>(f.ymm[i.reg]) = ymm;
    as<16>(f.x87.reg[i.reg & 7]) = mmx;
    f.gpr[i.reg] = gpr;
    f.oszapc = oszapc;
    f.x87.status = x87_status;
    f.x87.tags = x87_tags;
    return raise_simd(f, before, reported(f, flags));
}

}  // namespace polyvisor::soft
