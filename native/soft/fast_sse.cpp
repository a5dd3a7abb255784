// MOVUPS and its kin (MOVAPS, MOVUPD, MOVAPD, MOVDQU, MOVDQA), legacy and VEX. u->dst is the number
// of the XMM or YMM register that is written, u->src of the one that is read.
#include <emmintrin.h>

#include "soft/fast.hpp"

namespace polyvisor::soft {

namespace {

template <unsigned n>
struct Vector {
    u8 bytes[n];
};

template <unsigned n>
PV_INLINE void copy(void* to, const void* from) {
    auto* out = static_cast<__m128i*>(to);
    auto* in = static_cast<const __m128i*>(from);
    __m128i low = _mm_loadu_si128(in);
    if constexpr (n == 32) {
        __m128i high = _mm_loadu_si128(in + 1);
        _mm_storeu_si128(out + 1, high);
    }
    _mm_storeu_si128(out, low);
}

PV_INLINE void clear_upper(VcpuFrame* f, u8 n) {
    _mm_store_si128(reinterpret_cast<__m128i*>(f->ymm[n] + 16), _mm_setzero_si128());
}

/// run_slowly() is for accesses of at most 8 bytes: one that leaves the page it starts in is
/// generic.
template <unsigned n>
[[gnu::noinline, gnu::cold]] const Uop* vector_slowly(const Uop* u, VcpuFrame* f, u64 linear,
                                                      bool write) {
    if ((linear & kPageMask) > kPageSize - n) return run_generic(u, f);
    return run_slowly(u, f, linear, write);
}

[[gnu::noinline, gnu::cold]] const Uop* misaligned(const Uop* u, VcpuFrame* f) {
    raise_gp(*f);
    return leave_fault(u, f);
}

template <unsigned n, bool Clear>
const Uop* vector_copy(const Uop* u, VcpuFrame* f) {
    copy<n>(f->ymm[u->dst], f->ymm[u->src]);
    if constexpr (Clear) clear_upper(f, u->dst);
    PV_NEXT;
}

template <unsigned n, bool Clear, bool Aligned, AddressKind K>
const Uop* vector_load(const Uop* u, VcpuFrame* f) {
    u64 linear = address_of<K>(u, f);
    if (Aligned && PV_UNLIKELY(linear & (n - 1))) return misaligned(u, f);
    const Vector<n>* at;
    if (PV_UNLIKELY(!readable(f, linear, at))) return vector_slowly<n>(u, f, linear, false);
    copy<n>(f->ymm[u->dst], at);
    if constexpr (Clear) clear_upper(f, u->dst);
    PV_NEXT;
}

template <unsigned n, bool Aligned, AddressKind K>
const Uop* vector_store(const Uop* u, VcpuFrame* f) {
    u64 linear = address_of<K>(u, f);
    if (Aligned && PV_UNLIKELY(linear & (n - 1))) return misaligned(u, f);
    Vector<n>* at;
    if (PV_UNLIKELY(!writable(f, linear, at))) return vector_slowly<n>(u, f, linear, true);
    copy<n>(at, f->ymm[u->src]);
    PV_NEXT;
}

template <bool Store, unsigned n, bool Clear, bool Aligned>
Handler by_address(AddressKind kind) {
    auto pick = [kind](Handler base, Handler index, Handler seg, Handler flat32) {
        return kind == kAddressBase    ? base
               : kind == kAddressIndex ? index
               : kind == kAddressSeg   ? seg
                                       : flat32;
    };
    if constexpr (Store) {
        return pick(vector_store<n, Aligned, kAddressBase>, vector_store<n, Aligned, kAddressIndex>,
                    vector_store<n, Aligned, kAddressSeg>, vector_store<n, Aligned, kAddress32>);
    } else {
        return pick(vector_load<n, Clear, Aligned, kAddressBase>,
                    vector_load<n, Clear, Aligned, kAddressIndex>,
                    vector_load<n, Clear, Aligned, kAddressSeg>,
                    vector_load<n, Clear, Aligned, kAddress32>);
    }
}

template <unsigned n, bool Clear>
Handler by_form(const VectorMove& move, AddressKind kind) {
    if (move.store) {
        return move.aligned ? by_address<true, n, false, true>(kind)
                            : by_address<true, n, false, false>(kind);
    }
    return move.aligned ? by_address<false, n, Clear, true>(kind)
                        : by_address<false, n, Clear, false>(kind);
}

}  // namespace

bool vector_move(Op op, VectorMove& move) {
    switch (op) {
#define PV_VECTOR_MOVE(NAME, aligned)       \
    case Op::NAME##_Vx_Wx:                  \
        move = {16, false, aligned, false}; \
        return true;                        \
    case Op::NAME##_Wx_Vx:                  \
        move = {16, false, aligned, true};  \
        return true;                        \
    case Op::V##NAME##_Vdq_Wdq:             \
        move = {16, true, aligned, false};  \
        return true;                        \
    case Op::V##NAME##_Wdq_Vdq:             \
        move = {16, true, aligned, true};   \
        return true;                        \
    case Op::V##NAME##_Vqq_Wqq:             \
        move = {32, false, aligned, false}; \
        return true;                        \
    case Op::V##NAME##_Wqq_Vqq:             \
        move = {32, false, aligned, true};  \
        return true;
        PV_VECTOR_MOVE(MOVUPS, false)
        PV_VECTOR_MOVE(MOVUPD, false)
        PV_VECTOR_MOVE(MOVDQU, false)
        PV_VECTOR_MOVE(MOVAPS, true)
        PV_VECTOR_MOVE(MOVAPD, true)
        PV_VECTOR_MOVE(MOVDQA, true)
#undef PV_VECTOR_MOVE
        default:
            return false;
    }
}

Handler vector_copy_handler(const VectorMove& move) {
    if (move.bytes == 32) return vector_copy<32, false>;
    return move.clear ? vector_copy<16, true> : vector_copy<16, false>;
}

Handler vector_memory_handler(const VectorMove& move, AddressKind kind) {
    if (move.bytes == 32) return by_form<32, false>(move, kind);
    return move.clear ? by_form<16, true>(move, kind) : by_form<16, false>(move, kind);
}

}  // namespace polyvisor::soft
