#include "machine/stepping.hpp"

#include "cpu/debug.hpp"
#include "machine/breakpoints.hpp"

namespace polyvisor {

namespace {

// Whether a string instruction with a repeat prefix is at `linear`: a step of it that did not move
// RIP was one of its iterations.
bool is_repeated(const Vcpu& vcpu, const GuestMemory& memory, u64 linear) {
    bool repeated = false;
    for (unsigned n = 0; n < 15; ++n) {
        u64 gpa = 0;
        if (!vcpu.translate(linear + n, gpa) || memory.find(Gpa(gpa)) == nullptr) return false;
        u8 byte = memory.load<u8>(Gpa(gpa));
        switch (byte) {
            case 0xf2:
            case 0xf3:
                repeated = true;
                continue;
            case 0x26:
            case 0x2e:
            case 0x36:
            case 0x3e:
            case 0x64:
            case 0x65:
            case 0x66:
            case 0x67:
                continue;
            default:
                if (byte >= 0x40 && byte <= 0x4f) continue;  // REX; outside 64-bit mode INC and DEC
                return repeated &&
                       ((byte >= 0x6c && byte <= 0x6f) || (byte >= 0xa4 && byte <= 0xa7) ||
                        (byte >= 0xaa && byte <= 0xaf));
        }
    }
    return false;
}

// Halted with interrupts off: another step would not end.
bool is_halted_for_good(const CpuState& state) {
    constexpr u64 kInterruptFlag = bit(9);
    return state.activity == Activity::kHalted && !(state.rflags & kInterruptFlag) &&
           !state.nmi_pending;
}

}  // namespace

void single_step(Vcpu& vcpu, GuestMemory& memory, u64 instructions,
                 const std::function<bool(Exit&)>& serve) {
    GuestDebug debug;
    debug.single_step = true;
    CpuState state = vcpu.save();
    if (is_halted_for_good(state)) return;
    vcpu.set_debug(debug);
    u64 at = linear_rip(state);
    for (u64 done = 0; done < instructions;) {
        Exit exit = vcpu.run();
        if (exit.reason != ExitReason::kDebug) {
            if (!serve(exit)) break;
            continue;
        }
        if (!(exit.dr6 & kDr6Step)) continue;
        bool unfinished = exit.address == at && is_repeated(vcpu, memory, at);
        bool maybe_halted = exit.address == at + 1;  // HLT is a byte
        at = exit.address;
        if (!unfinished) ++done;
        if (maybe_halted && is_halted_for_good(vcpu.save())) break;
    }
    vcpu.set_debug({});
}

}  // namespace polyvisor
