// How a handler leaves its block.
#pragma once

#include "soft/uop.hpp"

namespace polyvisor::soft {

/// The instruction at `u` faulted (f->fault says how): RIP back to it, uncount what did not run.
[[gnu::noinline, gnu::cold]] const Uop* leave_fault(const Uop* u, VcpuFrame* f);
/// The instruction at `u` is done, but the rest of the block must not run (it was overwritten).
[[gnu::noinline, gnu::cold]] const Uop* leave_after(const Uop* u, VcpuFrame* f);

/// Goes on at `ip` by way of edge `slot` of the block. Stays inside the chain of handlers when the
/// edge is linked, the budget lasts and nobody wants attention.
inline const Uop* leave_to(VcpuFrame* f, u64 ip, unsigned slot) {
    Block* next = f->block->next[slot];
    if (PV_LIKELY(next != nullptr && next->epoch == f->epoch)) {
        s64 budget = f->budget - next->instructions;
        if (PV_LIKELY(budget >= 0 && f->irq_req.load(std::memory_order_relaxed) == 0)) {
            f->budget = budget;
            f->block = next;
            PV_GO(next->uops);
        }
    }
    f->rip = ip;
    f->link_slot = static_cast<u8>(slot);
    f->link_slot_valid = true;
    return nullptr;
}

/// Goes on at `ip` where that is not known in advance (RET, indirect jumps).
inline const Uop* leave_indirect(VcpuFrame* f, u64 ip) {
    const JumpCache::Entry& entry = f->jump_cache->entries[JumpCache::slot(ip)];
    if (PV_LIKELY(entry.ip == ip)) {
        Block* next = entry.block;
        if (PV_LIKELY(next->epoch == f->epoch && next->mode == f->mode)) {
            s64 budget = f->budget - next->instructions;
            if (PV_LIKELY(budget >= 0 && f->irq_req.load(std::memory_order_relaxed) == 0)) {
                f->budget = budget;
                f->block = next;
                PV_GO(next->uops);
            }
        }
    }
    f->rip = ip;
    f->link_slot_valid = false;
    return nullptr;
}

}  // namespace polyvisor::soft
