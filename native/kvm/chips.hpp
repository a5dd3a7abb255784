// KVM's in-kernel interrupt chips behind InterruptChips: all of them (kKernel), or the local APICs
// alone with our IOAPIC, 8259s and PIT (kSplit). State is moved in chips_state.cpp.
//
// GSIs of the routing table, kKernel:  0..15   8259 input n and IOAPIC pin n (0: pin 2; 2: nothing)
//                                      16..23  IOAPIC pin n
//                                      24..39  8259 input n - 24 alone
//                              kSplit: 0..23   what our IOAPIC's pins send, for KVM's EOI exits
//                              both:   40..    MSIs of irqfds
#pragma once

#include <array>
#include <map>
#include <mutex>
#include <vector>

#include "bus/interrupt_chips.hpp"
#include "irqchip/lapic.hpp"
#include "irqchip/pit.hpp"

namespace polyvisor::kvm {

class KvmVcpu;
class Vm;

class Chips final : public InterruptChips {
  public:
    static constexpr unsigned kPins = 24, kPicGsi = 24, kFirstMsiGsi = 40;

    /// Before any vCPU is made. Throws HostError, EngineUnavailable for what the kernel lacks.
    explicit Chips(Vm& vm);
    ~Chips() override;

    IrqchipMode mode() const override;
    void set_gsi(unsigned gsi, bool level) override;
    void set_pic(unsigned irq, bool level) override;
    bool send_msi(u64 address, u32 data) override;
    void connect_msi(int fd, u64 address, u32 data) override;
    void disconnect_msi(int fd) override;
    void set_ioapic_pin(unsigned pin, u64 address, u32 data, bool enabled) override;
    void set_eoi_handler(std::function<void(u8 vector)> handler) override;
    std::vector<u8> save(Kind kind, u32 index) const override;
    void restore(Kind kind, u32 index, std::span<const u8> state) override;

    /// KVM_EXIT_IOAPIC_EOI.
    void ended(u8 vector);
    /// The machine's time was moved (it was paused, restored), and the CPU's TSC with it: KVM keeps
    /// its timers in the host's time. On the vCPU's thread, before it enters the guest.
    void time_moved(u32 cpu);

  private:
    struct Message {
        u64 address = 0;
        u32 data = 0;
        bool operator==(const Message&) const = default;
    };
    struct Irqfd {
        Message message;
        unsigned gsi;
    };
    /// What KVM has no place for, kept from restore() until the machine's time goes on.
    struct Kept {
        u64 at = 0;  ///< virtual ns of the restore
        bool valid = false;
        u64 deadline = 0;  ///< guest's TSC; 0: KVM has it
        irqchip::Lapic::State state{};
    };

    void drive(unsigned gsi, bool level);
    void write_routes();
    irqchip::Lapic::Config lapic_config(u32 cpu) const;
    const KvmVcpu& vcpu(u32 cpu) const;
    bool untouched_since(u64 at) const;
    std::vector<u8> save_lapic(u32 cpu) const;
    void restore_lapic(u32 cpu, std::span<const u8> bytes);
    std::vector<u8> save_ioapic() const;
    void restore_ioapic(std::span<const u8> bytes);
    std::vector<u8> save_pic() const;
    void restore_pic(std::span<const u8> bytes);
    std::vector<u8> save_pit() const;
    void restore_pit(std::span<const u8> bytes);
    void forget_missed_ticks();

    Vm& vm_;
    mutable std::mutex mutex_;     // a leaf; not held while the EOI handler runs
    u32 pin_wires_ = 0;            // levels, by IOAPIC pin
    u32 pic_wires_ = 0;            // levels, by 8259 input
    std::map<int, Irqfd> irqfds_;  // by file descriptor
    // kSplit: what our IOAPIC's pins send, and what of it the kernel was told.
    std::array<Message, kPins> pins_{}, told_pins_{};
    std::function<void(u8)> eoi_handler_;
    std::vector<Kept> kept_lapics_;
    struct {
        u64 at = 0;
        bool valid = false;
        irqchip::Pit::State state{};
    } kept_pit_;
};

}  // namespace polyvisor::kvm
