#include "machine/engine_speed.hpp"

#include <time.h>

#include <algorithm>
#include <array>

#include "base/error.hpp"

namespace polyvisor {

namespace {

constexpr u64 kCode = 0x1000, kMemory = 0x2000;
// loop: dec ecx; jnz loop; hlt, in 16-bit code with 32-bit operands.
constexpr std::array<u8, 5> kLoop = {0x66, 0x49, 0x75, 0xfc, 0xf4};
constexpr u64 kInstructionsPerLoop = 2;
// Ring 0 in hardware and a KVM that emulates it are a factor of a thousand apart: start short, and
// grow until it takes long enough to be told from entering and leaving the guest.
constexpr u32 kFirstCount = 2'000, kGrowth = 8, kLastCount = 1u << 30;
constexpr double kEnough = 0.001;  // seconds
constexpr double kClose = 1.2;     // times
constexpr int kMostRuns = 8;

// A busy host must not make an engine look slow, so it is CPU time; a guest's counts as its
// thread's.
double cpu_seconds() {
    timespec now{};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

/// A CPU that nobody interrupts.
class NoInterrupts final : public LocalInterrupts {
  public:
    bool pending() const override { return false; }
    int acknowledge() override { return -1; }
    u8 cr8() const override { return 0; }
    void set_cr8(u8) override {}
    bool read_msr(u32, u64&) override { return false; }
    bool write_msr(u32, u64) override { return false; }
    u64 mmio_base() const override { return ~u64{0}; }
    void mmio_read(u32, std::span<u8> data) override { std::ranges::fill(data, 0xff); }
    void mmio_write(u32, std::span<const u8>) override {}
    void reset(bool) override {}
};

CpuState start_of_loop(u32 count) {
    CpuState state = reset_state(true);
    state.segments[kCs].selector = 0;
    state.segments[kCs].base = 0;
    state.rip = kCode;
    state.gpr[kRcx] = count;
    return state;
}

}  // namespace

double measure_speed(const std::function<std::unique_ptr<Engine>(const EngineConfig&)>& create,
                     const EngineOffer& offer) {
    GuestMemory memory;
    memory.add(Gpa(0), kMemory, "loop");
    memory.write(Gpa(kCode), kLoop);
    Bus pio("pio", 0x10000), mmio("mmio", bit(52));
    Clock clock;
    CpuidOptions options;
    options.physical_bits = offer.physical_bits;
    options.arch_capabilities = offer.arch_capabilities;
    u64 khz = offer.native_tsc_khz != 0 ? offer.native_tsc_khz : 1'000'000;
    clock.set_tsc_khz(khz);
    NoInterrupts interrupts;
    std::unique_ptr<Engine> engine = create(
        {memory, pio, mmio, clock, make_cpuid_policy("host", offer.features, 1, khz, options)});
    std::unique_ptr<Vcpu> vcpu = engine->create_vcpu(0, &interrupts);
    auto seconds_of = [&](u32 count) {
        vcpu->restore(start_of_loop(count));
        double start = cpu_seconds();
        Exit exit = vcpu->run();
        double seconds = cpu_seconds() - start;
        if (exit.reason == ExitReason::kHalt) return seconds;
        throw EngineUnavailable(engine->name(), "broken",
                                std::string("a guest that counts to ") + std::to_string(count) +
                                    " does not end, but with " + to_string(exit.reason) +
                                    (exit.text.empty() ? "" : ": " + exit.text));
    };
    // The first run touches memory, and caches, for the first time, and below another hypervisor
    // any run may have been held up. So the best counts, once another came close to it.
    auto best_of = [&](u32 count) {
        double best = seconds_of(count);
        for (int more = 1; more < kMostRuns; ++more) {
            double seconds = seconds_of(count);
            bool close = std::max(seconds, best) < kClose * std::min(seconds, best);
            best = std::min(best, seconds);
            if (close) break;
        }
        return best;
    };
    for (u32 count = kFirstCount;; count *= kGrowth) {
        double seconds = best_of(count);
        if (seconds >= kEnough || count > kLastCount / kGrowth) {
            return static_cast<double>(kInstructionsPerLoop * count) / seconds / 1e6;
        }
    }
}

}  // namespace polyvisor
