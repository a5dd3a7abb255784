#include "soft/kvm_clock.hpp"

#include <chrono>
#include <cstring>

namespace polyvisor::soft {
namespace {

struct TimePage {
    u32 version;  // odd while it is being written
    u32 pad0;
    u64 tsc_timestamp;
    u64 system_time;
    u32 tsc_to_system_mul;
    s8 tsc_shift;
    u8 flags;
    u8 pad[2];
};
static_assert(sizeof(TimePage) == 32);

constexpr u8 kTscStable = 1;
// Deterministic machines start at the same moment every time: 2025-01-01 00:00:00 UTC.
constexpr u64 kDeterministicEpoch = 1735689600;

// ns = (shift >= 0 ? tsc << shift : tsc >> -shift) * mul >> 32
void scale_for(u64 tsc_khz, u32& mul, s8& shift) {
    u64 hz = tsc_khz * 1000;
    s8 s = 0;
    while (hz > 2'000'000'000) hz >>= 1, --s;
    while (hz <= 1'000'000'000) hz <<= 1, ++s;
    // Now 1 GHz < hz <= 2 GHz: the multiplier is in [2^31, 2^32). Shifting may have lost bits of
    // hz, so it is computed from the exact frequency.
    u128 numerator = static_cast<u128>(1'000'000) << 32;
    u64 khz = tsc_khz;
    if (s >= 0) {
        mul = static_cast<u32>((numerator >> s) / khz);
    } else {
        mul = static_cast<u32>((numerator << -s) / khz);
    }
    shift = s;
}

bool valid(const VcpuFrame& f, u64 gpa, u64 size) {
    return (gpa & 3) == 0 && !environment(f).memory.span(Gpa(gpa), size).empty();
}

}  // namespace

void update_kvm_clock(VcpuFrame& f) {
    u64 gpa = f.msr.kvm_system_time & ~u64{1};
    if (!(f.msr.kvm_system_time & 1) || !valid(f, gpa, sizeof(TimePage))) return;
    Environment& env = environment(f);
    TimePage page{};
    // The guest's TSC is a linear function of virtual time, so one reading is good for ever; TSC
    // `tsc_offset` is time zero.
    page.version = (env.memory.load<u32>(Gpa(gpa)) & ~1u) + 2;
    page.tsc_timestamp = f.msr.tsc_offset;
    scale_for(env.clock.tsc_khz(), page.tsc_to_system_mul, page.tsc_shift);
    page.flags = kTscStable;
    env.memory.store<u32>(Gpa(gpa), page.version - 1);
    env.memory.store(Gpa(gpa + 4), u32{0});
    env.memory.write(Gpa(gpa + 8), {reinterpret_cast<const u8*>(&page) + 8, sizeof page - 8});
    env.memory.store<u32>(Gpa(gpa), page.version);
}

void write_wall_clock(VcpuFrame& f, u64 gpa) {
    if (!valid(f, gpa, 12)) return;
    Environment& env = environment(f);
    u64 boot_ns = kDeterministicEpoch * 1'000'000'000;
    if (!env.deterministic) {
        auto now = std::chrono::system_clock::now().time_since_epoch();
        boot_ns =
            static_cast<u64>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count()) -
            env.clock.now();
    }
    u32 version = (env.memory.load<u32>(Gpa(gpa)) & ~1u) + 2;
    env.memory.store<u32>(Gpa(gpa), version - 1);
    env.memory.store<u32>(Gpa(gpa + 4), static_cast<u32>(boot_ns / 1'000'000'000));
    env.memory.store<u32>(Gpa(gpa + 8), static_cast<u32>(boot_ns % 1'000'000'000));
    env.memory.store<u32>(Gpa(gpa), version);
}

}  // namespace polyvisor::soft
