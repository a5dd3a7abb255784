// ADD OR ADC SBB AND SUB XOR CMP, TEST, INC and DEC with a memory operand.
#include "soft/fast.hpp"

namespace polyvisor::soft {

namespace {

template <AluOp O, class T, AddressKind K, bool Live>
const Uop* alu_load(const Uop* u, VcpuFrame* f) {
    u64 linear = address_of<K>(u, f);
    const T* at;
    if (PV_UNLIKELY(!readable(f, linear, at))) return run_slowly(u, f, linear, false);
    T result = alu<O, T, Live>(f, gpr_at<T>(f, u->dst), *at);
    if constexpr (O != kCmp) set_gpr<T>(f, u->dst, result);
    PV_NEXT;
}

template <AluOp O, class T, AddressKind K, bool Immediate>
const Uop* alu_store(const Uop* u, VcpuFrame* f) {
    u64 linear = address_of<K>(u, f);
    T* at;
    bool hit = O == kCmp ? readable(f, linear, at) : writable(f, linear, at);
    if (PV_UNLIKELY(!hit)) return run_slowly(u, f, linear, O != kCmp);
    T b = Immediate ? immediate<T>(u) : gpr_at<T>(f, u->src);
    T result = alu<O, T, true>(f, *at, b);
    if constexpr (O != kCmp) *at = result;
    PV_NEXT;
}

template <class T, AddressKind K, bool Immediate>
const Uop* test_memory(const Uop* u, VcpuFrame* f) {
    u64 linear = address_of<K>(u, f);
    const T* at;
    if (PV_UNLIKELY(!readable(f, linear, at))) return run_slowly(u, f, linear, false);
    alu<kAnd, T, true>(f, *at, Immediate ? immediate<T>(u) : gpr_at<T>(f, u->src));
    PV_NEXT;
}

template <bool Increment, class T, AddressKind K>
const Uop* step_memory(const Uop* u, VcpuFrame* f) {
    u64 linear = address_of<K>(u, f);
    T* at;
    if (PV_UNLIKELY(!writable(f, linear, at))) return run_slowly(u, f, linear, true);
    T a = *at;
    u32 flags;
    if constexpr (Increment) {
        asm("btl $8, %k[old]\n\tinc %[a]\n\tlahf\n\tseto %%al"
            : [a] "+&r"(a), "=&a"(flags)
            : [old] "r"(u32{f->oszapc})
            : "cc");
    } else {
        asm("btl $8, %k[old]\n\tdec %[a]\n\tlahf\n\tseto %%al"
            : [a] "+&r"(a), "=&a"(flags)
            : [old] "r"(u32{f->oszapc})
            : "cc");
    }
    f->oszapc = static_cast<u16>(flags);
    *at = a;
    PV_NEXT;
}

// Calls `visit` with the address kind as a template argument. Byte and word forms are rarer: they
// use the general 64-bit form for all 64-bit kinds but segment ones.
template <class T, class F>
Handler with_kind(AddressKind kind, F visit) {
    switch (kind) {
        case kAddressBase:
            if constexpr (sizeof(T) >= 4) return visit.template operator()<kAddressBase>();
            [[fallthrough]];
        case kAddressIndex:
            return visit.template operator()<kAddressIndex>();
        case kAddressSeg:
            return visit.template operator()<kAddressSeg>();
        default:
            return visit.template operator()<kAddress32>();
    }
}

template <class T, AddressKind K, bool Live>
constexpr Handler kLoads[kAluOps] = {alu_load<kAdd, T, K, Live>, alu_load<kOr, T, K, Live>,
                                     alu_load<kAdc, T, K, Live>, alu_load<kSbb, T, K, Live>,
                                     alu_load<kAnd, T, K, Live>, alu_load<kSub, T, K, Live>,
                                     alu_load<kXor, T, K, Live>, alu_load<kCmp, T, K, Live>};

template <class T, AddressKind K, bool Immediate>
constexpr Handler kStores[kAluOps] = {
    alu_store<kAdd, T, K, Immediate>, alu_store<kOr, T, K, Immediate>,
    alu_store<kAdc, T, K, Immediate>, alu_store<kSbb, T, K, Immediate>,
    alu_store<kAnd, T, K, Immediate>, alu_store<kSub, T, K, Immediate>,
    alu_store<kXor, T, K, Immediate>, alu_store<kCmp, T, K, Immediate>};

}  // namespace

Handler alu_load_handler(AluOp op, unsigned size, AddressKind kind, bool live) {
    return with_size(size, [&]<class T>(T) -> Handler {
        return with_kind<T>(kind, [&]<AddressKind K>() -> Handler {
            if constexpr (sizeof(T) >= 4) {
                if (!live) return kLoads<T, K, false>[op];
            }
            return kLoads<T, K, true>[op];
        });
    });
}

Handler alu_store_handler(AluOp op, unsigned size, AddressKind kind, bool immediate) {
    return with_size(size, [&]<class T>(T) -> Handler {
        return with_kind<T>(kind, [&]<AddressKind K>() -> Handler {
            return immediate ? kStores<T, K, true>[op] : kStores<T, K, false>[op];
        });
    });
}

Handler test_memory_handler(unsigned size, AddressKind kind, bool immediate) {
    return with_size(size, [&]<class T>(T) -> Handler {
        return with_kind<T>(kind, [&]<AddressKind K>() -> Handler {
            return immediate ? test_memory<T, K, true> : test_memory<T, K, false>;
        });
    });
}

Handler unary_memory_handler(unsigned which, unsigned size, AddressKind kind) {
    if (which != kInc && which != kDec) return nullptr;
    return with_size(size, [&]<class T>(T) -> Handler {
        return with_kind<T>(kind, [&]<AddressKind K>() -> Handler {
            return which == kInc ? step_memory<true, T, K> : step_memory<false, T, K>;
        });
    });
}

}  // namespace polyvisor::soft
