// Two 8259A interrupt controllers, the second cascaded into input 2 of the first, with the
// edge/level registers (ELCR) that PCI added.
//
// Offsets (attach with Bus::attach(.., base)):  0,1 = master (port 0x20)   2,3 = slave (port 0xa0)
//                                               4,5 = ELCR (port 0x4d0)
#pragma once

#include <functional>
#include <mutex>

#include "bus/device.hpp"

namespace polyvisor::irqchip {

/// What a local APIC asks when an ExtINT is acknowledged: the 8259's INTA cycle.
class ExtIntSource {
  public:
    virtual ~ExtIntSource() = default;
    /// The vector, now in service (the spurious vector when the request went away).
    virtual int acknowledge() = 0;
};

class Pic final : public Device, public ExtIntSource {
  public:
    /// One 8259A as a snapshot keeps it.
    struct Chip {
        u8 irr = 0;          ///< requests latched or level-high
        u8 imr = 0;          ///< masked inputs
        u8 isr = 0;          ///< in service
        u8 lines = 0;        ///< present level of the inputs
        u8 elcr = 0;         ///< level-triggered inputs
        u8 vector_base = 0;  ///< ICW2
        u8 lowest = 7;       ///< input of lowest priority (rotation)
        u8 init_step = 0;    ///< 0: initialised; 2, 3, 4: the ICW that is awaited
        // Flags, 0 or 1.
        u8 icw4_needed = 0;
        u8 single = 0;      ///< ICW1.SNGL
        u8 level_mode = 0;  ///< ICW1.LTIM: every input is level-triggered
        u8 auto_eoi = 0;    ///< ICW4.AEOI
        u8 rotate_on_auto_eoi = 0;
        u8 fully_nested = 0;  ///< ICW4.SFNM
        u8 special_mask = 0;  ///< OCW3 SMM
        u8 poll = 0;          ///< OCW3 P: the next read is an acknowledge
        u8 read_isr = 0;      ///< OCW3 RIS
    };
    struct State {
        Chip chips[2];  ///< master, slave
    };

    /// `output` gets the INTR level, with the Pic's mutex held (it may call Lapic::set_lint).
    explicit Pic(std::function<void(bool)> output = {});

    std::string_view name() const override { return "pic"; }
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;
    void reset() override;
    std::vector<u8> save() const override;
    void restore(std::span<const u8> state) override;

    /// Input `irq` (0..15; 2 is the cascade and ignored).
    void set_irq(unsigned irq, bool level);
    int acknowledge() override;
    bool output() const;
    State state() const;
    /// Throws StateError for a state that these chips cannot have.
    static void validate(const State& state);
    /// Recomputes the cascade input of the master from the slave; the INTR level that follows.
    static bool settle(State& state);

  private:
    u8 read_chip(unsigned which, unsigned port);
    void write_chip(unsigned which, unsigned port, u8 value);
    void write_icw1(Chip& chip, u8 value);
    void write_icw(Chip& chip, u8 value);
    void write_ocw2(Chip& chip, u8 value);
    static int requesting(const State& state, unsigned which);
    int poll(unsigned which);
    void set_input(Chip& chip, unsigned input, bool level);
    void update(bool report = false);

    mutable std::mutex mutex_;  // after IrqRouter's, before Ioapic's and Lapic's
    std::function<void(bool)> output_callback_;
    State state_;
    bool output_ = false;
};

}  // namespace polyvisor::irqchip
