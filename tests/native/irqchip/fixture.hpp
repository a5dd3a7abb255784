// What the interrupt chips' tests share: a CPU that counts its signals, and short register
// accesses.
#pragma once

#include <atomic>
#include <initializer_list>

#include "bus/clock.hpp"
#include "bus/interrupts.hpp"
#include "irqchip/apic_bus.hpp"
#include "irqchip/ioapic.hpp"
#include "irqchip/lapic.hpp"

namespace polyvisor::irqchip {

struct FakeCpu final : CpuSignals {
    void interrupt() override { ++interrupts; }
    void nmi() override { ++nmis; }
    void smi() override { ++smis; }
    void init() override { ++inits; }
    void sipi(u8 vector) override {
        ++sipis;
        last_sipi = vector;
    }
    std::atomic<int> interrupts{0}, nmis{0}, smis{0}, inits{0}, sipis{0}, last_sipi{-1};
};

// A deterministic clock with a LAPIC and its CPU; xAPIC, software-enabled.
struct LapicFixture {
    explicit LapicFixture(u32 cpus = 1) : clock(Clock::Mode::kDeterministic) {
        for (u32 id = 0; id < cpus; ++id) {
            Lapic::Config config;
            config.id = id;
            config.bsp = id == 0;
            config.physical_bits = 40;
            lapics.push_back(std::make_unique<Lapic>(config, clock, bus));
            cpus_.push_back(std::make_unique<FakeCpu>());
            lapics.back()->connect(*cpus_.back());
            write(0xf0, 0x1ff, id);
        }
    }
    u32 read(u32 offset, u32 id = 0) {
        u32 value = 0;
        lapics[id]->mmio_read(offset, {reinterpret_cast<u8*>(&value), 4});
        return value;
    }
    void write(u32 offset, u32 value, u32 id = 0) {
        lapics[id]->mmio_write(offset, {reinterpret_cast<const u8*>(&value), 4});
    }
    void x2apic(u32 id = 0) {
        u64 base = 0;
        lapics[id]->read_msr(0x1b, base);
        lapics[id]->write_msr(0x1b, base | 0x400);
    }
    bool wrmsr(u32 index, u64 value, u32 id = 0) { return lapics[id]->write_msr(index, value); }
    /// ~0 - 1 for #GP.
    u64 rdmsr(u32 index, u32 id = 0) {
        u64 value = 0;
        return lapics[id]->read_msr(index, value) ? value : kFault;
    }
    void run_to(Nanoseconds time) {
        clock.advance_to(time);
        clock.run_expired();
    }
    void send_fixed(u8 vector, u32 id = 0, bool level = false) {
        ApicMessage message;
        message.destination = id;
        message.vector = vector;
        message.level_triggered = level;
        bus.deliver(message);
    }
    /// Acknowledges and ends one interrupt; its vector.
    int serve(u32 id = 0) {
        int vector = lapics[id]->acknowledge();
        if (vector >= 0) {
            u64 base = 0;
            lapics[id]->read_msr(0x1b, base);
            if (base & 0x400) {
                wrmsr(0x80b, 0, id);
            } else {
                write(0xb0, 0, id);
            }
        }
        return vector;
    }
    static constexpr u64 kFault = ~u64{1};

    Clock clock;
    ApicBus bus;
    std::vector<std::unique_ptr<Lapic>> lapics;
    std::vector<std::unique_ptr<FakeCpu>> cpus_;
    Lapic& lapic(u32 id = 0) { return *lapics[id]; }
    FakeCpu& cpu(u32 id = 0) { return *cpus_[id]; }
};

inline u8 in8(Device& device, u64 offset) {
    u8 value = 0;
    device.read(offset, {&value, 1});
    return value;
}
inline void out8(Device& device, u64 offset, u8 value) {
    device.write(offset, {&value, 1});
}
inline u32 in32(Device& device, u64 offset) {
    u32 value = 0;
    device.read(offset, {reinterpret_cast<u8*>(&value), 4});
    return value;
}
inline void out32(Device& device, u64 offset, u32 value) {
    device.write(offset, {reinterpret_cast<const u8*>(&value), 4});
}

}  // namespace polyvisor::irqchip
