// The stack of the running program: SS:rSP with the width that the mode and SS.B give it.
#include "soft/ops.hpp"

namespace polyvisor::soft {

namespace {

u64 stack_mask(const VcpuFrame& f) {
    if (f.long64()) return ~u64{0};
    return f.mode & kModeStack32 ? 0xffffffff : 0xffff;
}

void set_sp(VcpuFrame& f, u64 mask, u64 value) {
    u64& rsp = f.gpr[kRsp];
    if (mask == 0xffff) {
        rsp = (rsp & ~u64{0xffff}) | (value & 0xffff);
    } else {
        rsp = value & mask;
    }
}

const Insn kStackOperand = [] {
    Insn insn;
    insn.segment = kSs;
    return insn;
}();

template <class T>
bool pop_as(VcpuFrame& f, u64 sp, u64& value) {
    T popped;
    if (!load<T>(f, kStackOperand, sp, popped)) return false;
    value = popped;
    return true;
}

}  // namespace

bool push(VcpuFrame& f, u64 value, u32 size) {
    u64 mask = stack_mask(f);
    u64 sp = (f.gpr[kRsp] - size) & mask;
    bool ok = size == 8   ? store<u64>(f, kStackOperand, sp, value)
              : size == 4 ? store<u32>(f, kStackOperand, sp, static_cast<u32>(value))
                          : store<u16>(f, kStackOperand, sp, static_cast<u16>(value));
    if (ok) set_sp(f, mask, sp);
    return ok;
}

bool pop(VcpuFrame& f, u64& value, u32 size) {
    u64 mask = stack_mask(f);
    u64 sp = f.gpr[kRsp] & mask;
    bool ok = size == 8   ? pop_as<u64>(f, sp, value)
              : size == 4 ? pop_as<u32>(f, sp, value)
                          : pop_as<u16>(f, sp, value);
    if (ok) set_sp(f, mask, sp + size);
    return ok;
}

}  // namespace polyvisor::soft
