// The local APIC (SDM 3A chapter 11) in user space: xAPIC registers at IA32_APIC_BASE, x2APIC MSRs,
// timer with one-shot, periodic and TSC-deadline modes.
//
// Threads: devices, other vCPUs and the timer thread deliver into it, its own vCPU reads and writes
// it. All of it is behind one mutex, except pending(), which the vCPU looks at between
// instructions: each change under the mutex recomputes the one word that pending() reads, and tells
// the CPU when it became non-zero. CpuSignals are called after the mutex was released.
#pragma once

#include <atomic>
#include <mutex>

#include "base/log.hpp"
#include "bus/clock.hpp"
#include "bus/interrupts.hpp"
#include "irqchip/apic_bus.hpp"
#include "irqchip/pic.hpp"

namespace polyvisor::irqchip {

class Lapic final : public LocalInterrupts {
  public:
    /// The timer counts at this rate divided by the divide configuration (CPUID leaf 0x15 ECX and
    /// the hypervisor timing leaf tell guests).
    static constexpr u64 kBusFrequency = 1'000'000'000;  ///< Hz
    static constexpr u32 kVersion = 0x14;
    static constexpr u64 kDefaultBase = 0xfee00000;
    /// A periodic timer fires no more often than this; shorter periods lose interrupts.
    static constexpr Nanoseconds kMinPeriod = 50'000;

    /// What one can configure; the rest is the architecture.
    struct Config {
        u32 id = 0;                ///< initial APIC id (x2APIC id; the low 8 bits are the xAPIC id)
        bool bsp = false;          ///< IA32_APIC_BASE.BSP
        bool x2apic = true;        ///< CPUID.1:ECX[21]
        bool tsc_deadline = true;  ///< CPUID.1:ECX[24]
        u8 physical_bits = 52;  ///< width of the base address: more bits in IA32_APIC_BASE are #GP
    };

    enum Lvt : unsigned { kTimer, kThermal, kPerf, kLint0, kLint1, kError, kLvtCount };

    struct State {
        u64 apic_base;       ///< IA32_APIC_BASE
        u64 icr;             ///< xAPIC: destination in bits 63..56
        u64 timer_start;     ///< virtual ns when the present count was loaded
        u64 timer_deadline;  ///< virtual ns of the next expiry, kNever
        u64 tsc_deadline;    ///< IA32_TSC_DEADLINE as written; 0 is disarmed
        u32 id;              ///< the x2APIC id
        u32 tpr;
        u32 ldr;  ///< xAPIC: bits 31..24
        u32 dfr;
        u32 svr;
        u32 isr[8], tmr[8], irr[8];
        u32 esr;          ///< as read
        u32 esr_pending;  ///< errors since the last write to ESR
        u32 lvt[kLvtCount];
        u32 initial_count;
        u32 divide;
        u8 lint;     ///< present level of LINT0 (bit 0) and LINT1 (bit 1)
        u8 ext_int;  ///< 1: an ExtINT message (not LINT0) awaits its acknowledge
        u8 reserved[2];
    };

    /// Attaches itself to `bus`. `log` (optional) gets guest mistakes.
    Lapic(const Config& config, Clock& clock, ApicBus& bus, Log* log = nullptr);
    ~Lapic() override;

    /// The CPU to signal; not called before it is set.
    void connect(CpuSignals& cpu) { cpu_.store(&cpu, std::memory_order_release); }
    void disconnect() { cpu_.store(nullptr, std::memory_order_release); }
    /// Where ExtINT vectors come from (the 8259 pair).
    void set_ext_int_source(ExtIntSource* source) { ext_int_ = source; }

    // LocalInterrupts, called by the vCPU.
    bool pending() const override { return deliverable_.load(std::memory_order_acquire) != 0; }
    int acknowledge() override;
    u8 cr8() const override;
    void set_cr8(u8 priority) override;
    bool read_msr(u32 index, u64& value) override;
    bool write_msr(u32 index, u64 value) override;
    u64 mmio_base() const override { return mmio_base_.load(std::memory_order_relaxed); }
    void mmio_read(u32 offset, std::span<u8> data) override;
    void mmio_write(u32 offset, std::span<const u8> data) override;
    void reset(bool init) override;

    /// Guest TSC minus Clock::tsc() (IA32_TSC_ADJUST and writes to IA32_TIME_STAMP_COUNTER): moves
    /// an armed TSC deadline with it. An engine that translates the deadlines it passes on
    /// itself leaves this at 0.
    void set_tsc_offset(u64 offset);

    // Called by the ApicBus.
    bool matches(const ApicMessage& message, u32 broadcast) const;
    /// What lowest-priority delivery compares: the processor priority. ~0 when it accepts nothing.
    u32 arbitration_priority() const;
    /// False when it is switched off (software or hardware) for such a message.
    bool accept(const ApicMessage& message);
    void set_lint(unsigned which, bool level);

    /// What firmware leaves the boot CPU with: enabled, LINT0 = ExtINT, LINT1 = NMI ("virtual
    /// wire", MP specification 3.6.2.2), so that the 8259 works before an OS programs the LAPIC.
    void set_virtual_wire();
    /// The thermal sensor or a performance counter overflowed.
    void local_interrupt(Lvt source);

    u32 id() const { return config_.id; }
    bool x2apic() const;

    State state() const;
    std::vector<u8> save() const;
    /// Throws StateError, changing nothing, for a state this LAPIC cannot have. Restore the Clock
    /// first.
    void restore(std::span<const u8> state);
    /// Throws StateError for a state that a LAPIC of this configuration cannot have.
    static void validate(const State& state, const Config& config);
    /// What set_virtual_wire() does, on a State.
    static void set_virtual_wire(State& state);
    /// The bits of an LVT entry that a guest can write.
    static u32 lvt_writable(unsigned which, const Config& config);

  private:
    struct Outcome;  // what to do once the mutex is released

    bool read_register(u32 index, u64& value) const;
    bool write_register(u32 index, u32 value, Outcome& out);
    bool write_x2apic(u32 index, u64 value, Outcome& out);
    bool write_apic_base(u64 value, Outcome& out);
    void write_svr(u32 value);
    void write_icr(u64 value, Outcome& out);
    void write_lvt(unsigned which, u32 value, Outcome& out);
    void end_of_interrupt(Outcome& out);
    void fire_lvt(unsigned which, Outcome& out);
    void receive_fixed(u8 vector, bool level, Outcome& out);
    void error(u32 bits, Outcome& out);
    void write_tsc_deadline(u64 value, Outcome& out);
    void timer_expired();
    void start_timer(u32 count);
    void rescale_timer(u32 divide);
    u32 current_count() const;
    u32 divider() const;
    u32 timer_mode() const { return (state_.lvt[kTimer] >> 17) & 3; }
    void stop_timer();
    void arm_deadline();
    void reset_registers();
    u32 logical_id() const;
    u8 processor_priority() const;
    bool ext_int_requested() const;
    bool hardware_enabled() const { return state_.apic_base & bit(11); }
    bool in_x2apic() const {
        return (state_.apic_base & (bit(10) | bit(11))) == (bit(10) | bit(11));
    }
    bool software_enabled() const { return state_.svr & 0x100; }
    void update(Outcome& out);
    void update_mmio_base();
    void finish(const Outcome& out);

    Config config_;
    Clock& clock_;
    ApicBus& bus_;
    Log* log_;
    ExtIntSource* ext_int_ = nullptr;
    std::atomic<CpuSignals*> cpu_{nullptr};

    mutable std::mutex mutex_;  // after Ioapic's; only the clock's is taken under it
    State state_{};
    u64 tsc_offset_ = 0;
    std::atomic<u32> deliverable_{0};  // what acknowledge() would give: vector | kFixed, or kExtInt
    std::atomic<u64> mmio_base_{kDefaultBase};
    Timer timer_;
};

}  // namespace polyvisor::irqchip
