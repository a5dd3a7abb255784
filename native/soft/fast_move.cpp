// MOV, MOVZX, MOVSX, MOVSXD, LEA, and PUSH/POP in 64-bit mode.
#include "soft/fast.hpp"

namespace polyvisor::soft {

namespace {

template <class T, bool Immediate>
const Uop* move_register(const Uop* u, VcpuFrame* f) {
    set_gpr<T>(f, u->dst, Immediate ? static_cast<T>(u->disp) : gpr_at<T>(f, u->src));
    PV_NEXT;
}

template <class T, AddressKind K>
const Uop* load_register(const Uop* u, VcpuFrame* f) {
    u64 linear = address_of<K>(u, f);
    const T* at;
    if (PV_UNLIKELY(!readable(f, linear, at))) return run_slowly(u, f, linear, false);
    set_gpr<T>(f, u->dst, *at);
    PV_NEXT;
}

template <class T, AddressKind K, bool Immediate>
const Uop* store_register(const Uop* u, VcpuFrame* f) {
    u64 linear = address_of<K>(u, f);
    T* at;
    if (PV_UNLIKELY(!writable(f, linear, at))) return run_slowly(u, f, linear, true);
    *at = Immediate ? immediate<T>(u) : gpr_at<T>(f, u->src);
    PV_NEXT;
}

template <class To, class From>
const Uop* extend(const Uop* u, VcpuFrame* f) {
    set_gpr<std::make_unsigned_t<To>>(f, u->dst, static_cast<To>(gpr_at<From>(f, u->src)));
    PV_NEXT;
}

template <class To, class From, AddressKind K>
const Uop* extend_load(const Uop* u, VcpuFrame* f) {
    u64 linear = address_of<K>(u, f);
    const From* at;
    if (PV_UNLIKELY(!readable(f, linear, at))) return run_slowly(u, f, linear, false);
    set_gpr<std::make_unsigned_t<To>>(f, u->dst, static_cast<To>(*at));
    PV_NEXT;
}

template <class T, AddressKind K>
const Uop* lea(const Uop* u, VcpuFrame* f) {
    set_gpr<T>(f, u->dst, static_cast<T>(address_of<K>(u, f)));
    PV_NEXT;
}

template <bool Immediate>
const Uop* push_register(const Uop* u, VcpuFrame* f) {
    u64 linear = f->gpr[kRsp] - 8;
    u64* at;
    if (PV_UNLIKELY(!writable(f, linear, at))) return run_slowly(u, f, linear, true);
    *at = Immediate ? immediate<u64>(u) : gpr_at<u64>(f, u->src);
    f->gpr[kRsp] = linear;
    PV_NEXT;
}

const Uop* pop_register(const Uop* u, VcpuFrame* f) {
    u64 linear = f->gpr[kRsp];
    const u64* at;
    if (PV_UNLIKELY(!readable(f, linear, at))) return run_slowly(u, f, linear, false);
    u64 value = *at;
    f->gpr[kRsp] = linear + 8;
    gpr_at<u64>(f, u->dst) = value;
    PV_NEXT;
}

template <class F>
Handler with_kind(AddressKind kind, F visit) {
    switch (kind) {
        case kAddressBase:
            return visit.template operator()<kAddressBase>();
        case kAddressIndex:
            return visit.template operator()<kAddressIndex>();
        case kAddressSeg:
            return visit.template operator()<kAddressSeg>();
        default:
            return visit.template operator()<kAddress32>();
    }
}

// Calls `visit` with source and destination types of an extension.
template <class F>
Handler with_extension(unsigned to, unsigned from, bool sign, F visit) {
    auto with_from = [&]<class To>(To) -> Handler {
        if (sign) {
            using S = std::make_signed_t<To>;
            return from == 1 ? visit(S{}, s8{}) : from == 2 ? visit(S{}, s16{}) : visit(S{}, s32{});
        }
        return from == 1 ? visit(To{}, u8{}) : visit(To{}, u16{});
    };
    if (to == 4) return with_from(u32{});
    if (to == 8) return with_from(u64{});
    return nullptr;
}

}  // namespace

Handler move_register_handler(unsigned size, bool immediate) {
    return with_size(size, [&]<class T>(T) -> Handler {
        return immediate ? move_register<T, true> : move_register<T, false>;
    });
}

Handler load_handler(unsigned size, AddressKind kind) {
    return with_size(size, [&]<class T>(T) -> Handler {
        return with_kind(kind, [&]<AddressKind K>() -> Handler { return load_register<T, K>; });
    });
}

Handler store_handler(unsigned size, AddressKind kind, bool immediate) {
    return with_size(size, [&]<class T>(T) -> Handler {
        return with_kind(kind, [&]<AddressKind K>() -> Handler {
            return immediate ? store_register<T, K, true> : store_register<T, K, false>;
        });
    });
}

Handler extend_handler(unsigned to, unsigned from, bool sign) {
    return with_extension(to, from, sign, [&]<class To, class From>(To, From) -> Handler {
        return extend<To, From>;
    });
}

Handler extend_load_handler(unsigned to, unsigned from, bool sign, AddressKind kind) {
    return with_extension(to, from, sign, [&]<class To, class From>(To, From) -> Handler {
        return with_kind(kind,
                         [&]<AddressKind K>() -> Handler { return extend_load<To, From, K>; });
    });
}

Handler lea_handler(unsigned size, AddressKind kind) {
    if (kind == kAddressSeg || size < 4) return nullptr;
    return with_kind(
        kind, [&]<AddressKind K>() -> Handler { return size == 8 ? lea<u64, K> : lea<u32, K>; });
}

Handler push_handler(bool immediate) {
    return immediate ? push_register<true> : push_register<false>;
}

Handler pop_handler() {
    return pop_register;
}

}  // namespace polyvisor::soft
