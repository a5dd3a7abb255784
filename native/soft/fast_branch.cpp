// Near branches of 64-bit and flat 32-bit code.
#include "soft/fast.hpp"

namespace polyvisor::soft {

namespace {

PV_INLINE u64 after(const Uop* u, VcpuFrame* f) {
    u64 ip = f->block->ip + u->offset + u->length;
    return f->long64() ? ip : static_cast<u32>(ip);
}

// A target that is not canonical faults on the branch itself (SDM 2, JMP): left to the operation.
PV_INLINE bool canonical48(u64 ip) {
    return static_cast<u64>(static_cast<s64>(ip << 16) >> 16) == ip;
}

template <unsigned C>
const Uop* jcc(const Uop* u, VcpuFrame* f) {
    if (condition<C>(f->oszapc)) return leave_to(f, u->disp, 1);
    return leave_to(f, after(u, f), 0);
}

const Uop* jump(const Uop* u, VcpuFrame* f) {
    return leave_to(f, u->disp, 0);
}

const Uop* call(const Uop* u, VcpuFrame* f) {
    u64 linear = f->gpr[kRsp] - 8;
    u64* at;
    if (PV_UNLIKELY(!writable(f, linear, at))) return run_slowly(u, f, linear, true);
    *at = f->block->ip + u->offset + u->length;
    f->gpr[kRsp] = linear;
    return leave_to(f, u->disp, 0);
}

const Uop* ret(const Uop* u, VcpuFrame* f) {
    u64 linear = f->gpr[kRsp];
    const u64* at;
    if (PV_UNLIKELY(!readable(f, linear, at))) return run_slowly(u, f, linear, false);
    u64 ip = *at;
    if (PV_UNLIKELY(!canonical48(ip))) return run_generic(u, f);
    f->gpr[kRsp] = linear + 8;
    return leave_indirect(f, ip);
}

// `Loaded`: the target came from memory. Then a stack page that misses must not lead to another
// try: table and stack may need the same TLB entry, and would take it from each other for ever.
template <bool Call, bool Loaded>
PV_INLINE const Uop* go_indirect(const Uop* u, VcpuFrame* f, u64 ip) {
    if (PV_UNLIKELY(!canonical48(ip))) return run_generic(u, f);
    if constexpr (Call) {
        u64 linear = f->gpr[kRsp] - 8;
        u64* at;
        if (PV_UNLIKELY(!writable(f, linear, at))) {
            if constexpr (Loaded) return run_generic(u, f);
            return run_slowly(u, f, linear, true);
        }
        *at = f->block->ip + u->offset + u->length;
        f->gpr[kRsp] = linear;
    }
    return leave_indirect(f, ip);
}

template <bool Call>
const Uop* indirect(const Uop* u, VcpuFrame* f) {
    return go_indirect<Call, false>(u, f, gpr_at<u64>(f, u->src));
}

template <bool Call, AddressKind K>
const Uop* indirect_load(const Uop* u, VcpuFrame* f) {
    u64 linear = address_of<K>(u, f);
    const u64* at;
    if (PV_UNLIKELY(!readable(f, linear, at))) return run_slowly(u, f, linear, false);
    return go_indirect<Call, true>(u, f, *at);
}

constexpr Handler kJcc[16] = {jcc<0>, jcc<1>, jcc<2>,  jcc<3>,  jcc<4>,  jcc<5>,  jcc<6>,  jcc<7>,
                              jcc<8>, jcc<9>, jcc<10>, jcc<11>, jcc<12>, jcc<13>, jcc<14>, jcc<15>};

}  // namespace

Handler jcc_handler(unsigned cc) {
    return kJcc[cc];
}
Handler jump_handler() {
    return jump;
}
Handler call_handler() {
    return call;
}
Handler return_handler() {
    return ret;
}
Handler indirect_handler(bool call) {
    return call ? indirect<true> : indirect<false>;
}
Handler indirect_load_handler(bool call, AddressKind kind) {
    if (kind == kAddressBase) {
        return call ? indirect_load<true, kAddressBase> : indirect_load<false, kAddressBase>;
    }
    if (kind == kAddressIndex) {
        return call ? indirect_load<true, kAddressIndex> : indirect_load<false, kAddressIndex>;
    }
    return nullptr;
}

}  // namespace polyvisor::soft
