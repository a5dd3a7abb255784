// ADD OR ADC SBB AND SUB XOR CMP between registers and immediates, TEST, and CMP/TEST fused with
// Jcc.
#include "soft/fast.hpp"

namespace polyvisor::soft {

namespace {

template <AluOp O, class T, bool Immediate, bool Live>
const Uop* alu_register(const Uop* u, VcpuFrame* f) {
    T a = gpr_at<T>(f, u->dst);
    T b = Immediate ? immediate<T>(u) : gpr_at<T>(f, u->src);
    T result = alu<O, T, Live>(f, a, b);
    if constexpr (O != kCmp) set_gpr<T>(f, u->dst, result);
    PV_NEXT;
}

template <class T, bool Immediate>
const Uop* test_register(const Uop* u, VcpuFrame* f) {
    T b = Immediate ? immediate<T>(u) : gpr_at<T>(f, u->src);
    alu<kAnd, T, true>(f, gpr_at<T>(f, u->dst), b);
    PV_NEXT;
}

// u->disp is the taken target, u->cc unused; edge 1 is taken, edge 0 falls through.
template <bool Test, class T, bool Immediate, unsigned C>
const Uop* fused(const Uop* u, VcpuFrame* f) {
    T b = Immediate ? immediate<T>(u) : gpr_at<T>(f, u->src);
    alu<Test ? kAnd : kSub, T, true>(f, gpr_at<T>(f, u->dst), b);
    if (condition<C>(f->oszapc)) return leave_to(f, u->disp, 1);
    u64 next = f->block->ip + u->offset + u->length;
    return leave_to(f, f->long64() ? next : static_cast<u32>(next), 0);
}

template <class T, bool Immediate, bool Live>
constexpr Handler kAluHandlers[kAluOps] = {
    alu_register<kAdd, T, Immediate, Live>, alu_register<kOr, T, Immediate, Live>,
    alu_register<kAdc, T, Immediate, Live>, alu_register<kSbb, T, Immediate, Live>,
    alu_register<kAnd, T, Immediate, Live>, alu_register<kSub, T, Immediate, Live>,
    alu_register<kXor, T, Immediate, Live>, alu_register<kCmp, T, Immediate, Live>};

template <bool Test, class T, bool Immediate>
constexpr Handler kFusedHandlers[16] = {
    fused<Test, T, Immediate, 0>,  fused<Test, T, Immediate, 1>,  fused<Test, T, Immediate, 2>,
    fused<Test, T, Immediate, 3>,  fused<Test, T, Immediate, 4>,  fused<Test, T, Immediate, 5>,
    fused<Test, T, Immediate, 6>,  fused<Test, T, Immediate, 7>,  fused<Test, T, Immediate, 8>,
    fused<Test, T, Immediate, 9>,  fused<Test, T, Immediate, 10>, fused<Test, T, Immediate, 11>,
    fused<Test, T, Immediate, 12>, fused<Test, T, Immediate, 13>, fused<Test, T, Immediate, 14>,
    fused<Test, T, Immediate, 15>};

}  // namespace

Handler alu_register_handler(AluOp op, unsigned size, bool immediate, bool live) {
    return with_size(size, [&]<class T>(T) -> Handler {
        if (immediate) {
            return live ? kAluHandlers<T, true, true>[op] : kAluHandlers<T, true, false>[op];
        }
        return live ? kAluHandlers<T, false, true>[op] : kAluHandlers<T, false, false>[op];
    });
}

Handler test_handler(unsigned size, bool immediate) {
    return with_size(size, [&]<class T>(T) -> Handler {
        return immediate ? test_register<T, true> : test_register<T, false>;
    });
}

Handler fused_handler(bool test, unsigned size, bool immediate, unsigned cc) {
    return with_size(size, [&]<class T>(T) -> Handler {
        if constexpr (sizeof(T) == 2) return nullptr;
        if (immediate) {
            return test ? kFusedHandlers<true, T, true>[cc] : kFusedHandlers<false, T, true>[cc];
        }
        return test ? kFusedHandlers<true, T, false>[cc] : kFusedHandlers<false, T, false>[cc];
    });
}

}  // namespace polyvisor::soft
