#include "soft/generic.hpp"

#include "soft/leave.hpp"
#include "soft/simd_exceptions.hpp"

namespace polyvisor::soft {

namespace {

const OpInsn& op_insn(const Uop* u) {
    return *reinterpret_cast<const OpInsn*>(u->disp);
}

inline u64 address64(const VcpuFrame& f, const Insn& i) {
    return f.gpr[i.base] + (f.gpr[i.index] << i.scale) + static_cast<u64>(i.disp);
}

// Not inlined: a handler with a local variable whose address is known elsewhere cannot tail-call.
[[gnu::noinline]] bool aligned_segmented(VcpuFrame& f, const Insn& i, u64 ea, u32 size) {
    u64 linear;
    u64 flat = f.seg[i.segment].base + ea;  // outside 64-bit mode, alignment comes before the limit
    if (!f.long64() && (flat & (size - 1))) return raise_gp(f);
    if (!linear_address(f, i.segment, ea, size, false, linear)) return false;
    return (linear & (size - 1)) == 0 || raise_gp(f);
}

}  // namespace

u64 effective_address(const VcpuFrame& f, const Insn& i) {
    u64 address = address64(f, i);
    return i.addrsize == 8   ? address
           : i.addrsize == 4 ? static_cast<u32>(address)
                             : static_cast<u16>(address);
}

#define PV_RUN_OPERATION(address)                                                 \
    const OpInsn& o = op_insn(u);                                                 \
    f->uop = u;                                                                   \
    if (PV_UNLIKELY(!o.operation(*f, o.insn, address))) return leave_fault(u, f); \
    if (PV_UNLIKELY(f->block_dead)) return leave_after(u, f);                     \
    PV_NEXT

const Uop* run_plain(const Uop* u, VcpuFrame* f) {
    PV_RUN_OPERATION(0);
}
const Uop* run_mem64(const Uop* u, VcpuFrame* f) {
    PV_RUN_OPERATION(address64(*f, o.insn));
}
const Uop* run_mem_any(const Uop* u, VcpuFrame* f) {
    PV_RUN_OPERATION(effective_address(*f, o.insn));
}

const Uop* run_mem64_aligned(const Uop* u, VcpuFrame* f) {
    const OpInsn& o = op_insn(u);
    u64 ea = address64(*f, o.insn);
    f->uop = u;
    if (PV_UNLIKELY((ea & (u->size - 1u)) || o.insn.segment >= kFs)) {
        if (!aligned_segmented(*f, o.insn, ea, u->size)) return leave_fault(u, f);
    }
    if (PV_UNLIKELY(!o.operation(*f, o.insn, ea))) return leave_fault(u, f);
    if (PV_UNLIKELY(f->block_dead)) return leave_after(u, f);
    PV_NEXT;
}

const Uop* run_simd_checked(const Uop* u, VcpuFrame* f) {
    const OpInsn& o = op_insn(u);
    f->uop = u;
    u64 address = o.insn.has_mem ? effective_address(*f, o.insn) : 0;
    if (PV_UNLIKELY(!run_checked_simd(*f, o.insn, address, o.operation))) return leave_fault(u, f);
    if (PV_UNLIKELY(f->block_dead)) return leave_after(u, f);
    PV_NEXT;
}

const Uop* run_ending(const Uop* u, VcpuFrame* f) {
    const OpInsn& o = op_insn(u);
    f->uop = u;
    u64 ip = f->block->ip + u->offset + u->length;
    f->rip = f->long64() ? ip : static_cast<u32>(ip);
    u64 address = o.insn.has_mem ? effective_address(*f, o.insn) : 0;
    if (PV_UNLIKELY(!o.operation(*f, o.insn, address))) {
        if (f->fault.trap) return nullptr;  // done, and RIP is where to go on
        return leave_fault(u, f);
    }
    f->link_slot_valid = false;
    return nullptr;
}

const Uop* raise_uop(const Uop* u, VcpuFrame* f) {
    if (u->size != 0) {
        raise(*f, u->cc, u->imm);
    } else {
        raise(*f, u->cc);
    }
    return leave_fault(u, f);
}

const Uop* check_mf(const Uop* u, VcpuFrame* f) {
    if (PV_UNLIKELY(f->x87.status & 0x80)) {
        raise(*f, kMf);
        return leave_fault(u, f);
    }
    PV_NEXT;
}

const Uop* check_aligned(const Uop* u, VcpuFrame* f) {
    const Insn& i = op_insn(u).insn;
    u64 ea = effective_address(*f, i);
    u64 mask = u->size - 1u;
    if (PV_LIKELY(f->long64() && i.segment < kFs && (ea & mask) == 0)) PV_NEXT;
    if (PV_UNLIKELY(!aligned_segmented(*f, i, ea, u->size))) return leave_fault(u, f);
    PV_NEXT;
}

const Uop* fall_through(const Uop* u, VcpuFrame* f) {
    return leave_to(f, u->disp, 0);
}

const Uop* leave_fault(const Uop* u, VcpuFrame* f) {
    const Block& block = *f->block;
    f->rip = block.ip + u->offset;
    f->budget += block.instructions - u->number;
    f->link_slot_valid = false;
    return nullptr;
}

const Uop* leave_after(const Uop* u, VcpuFrame* f) {
    const Block& block = *f->block;
    u64 ip = block.ip + u->offset + u->length;
    f->rip = f->long64() ? ip : static_cast<u32>(ip);
    f->budget += block.instructions - (u + 1)->number;
    f->link_slot_valid = false;
    return nullptr;
}

u64 current_ip(const VcpuFrame& f, const Insn&) {
    return f.block->ip + f.uop->offset;
}

u64 next_ip(const VcpuFrame& f, const Insn&) {
    u64 ip = f.block->ip + f.uop->offset + f.uop->length;
    return f.long64() ? ip : static_cast<u32>(ip);
}

}  // namespace polyvisor::soft
