// KVM's in-kernel interrupt chips behind InterruptChips: all of them (kKernel), or the local APICs
// alone with our IOAPIC, 8259s and PIT (kSplit).
//
// GSIs of the routing table, kKernel:  0..15   8259 input n and IOAPIC pin n (0: pin 2)
//                                      16..23  IOAPIC pin n
//                                      24..39  8259 input n - 24 alone
//                              kSplit: 0..23   what our IOAPIC's pins send, for KVM's EOI exits
//                              both:   40..    MSIs of irqfds
#pragma once

#include <array>
#include <map>
#include <mutex>

#include "base/fd.hpp"
#include "bus/interrupt_chips.hpp"

namespace polyvisor::kvm {

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
    void send_msi(u64 address, u32 data) override;
    void connect_msi(int fd, u64 address, u32 data) override;
    void disconnect_msi(int fd) override;
    void set_ioapic_pin(unsigned pin, u64 address, u32 data, bool enabled) override;
    void set_eoi_handler(std::function<void(u8 vector)> handler) override;
    std::vector<u8> save(Kind kind, u32 index) const override;
    void restore(Kind kind, u32 index, std::span<const u8> state) override;

    /// KVM_EXIT_IOAPIC_EOI.
    void ended(u8 vector);

  private:
    struct Msi {
        u64 address;
        u32 data;
        unsigned gsi;
    };
    void write_routes();

    Vm& vm_;
    mutable std::mutex mutex_;  // a leaf; not held while the EOI handler runs
    std::map<int, Msi> fds_;    // irqfds by file descriptor
    std::array<Msi, kPins> pins_{};
    u32 enabled_pins_ = 0;
    std::function<void(u8)> eoi_handler_;
};

}  // namespace polyvisor::kvm
