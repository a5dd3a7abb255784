#include "irqchip/irq_router.hpp"

#include "base/error.hpp"

namespace polyvisor::irqchip {

namespace {

constexpr u8 kNoPic = 0xff;
constexpr unsigned kTimerPin = 2;

unsigned pin_of(unsigned gsi) {
    return gsi == 0 ? kTimerPin : gsi;
}

}  // namespace

class IrqRouter::Source final : public IrqLine {
  public:
    Source(IrqRouter& router, unsigned pin) : router_(router), pin_(pin) {}
    ~Source() override { set(false); }
    void set(bool level) override {
        std::lock_guard lock(router_.mutex_);
        if (level == level_) return;
        level_ = level;
        router_.change(pin_, level);
    }

  private:
    IrqRouter& router_;
    unsigned pin_;
    bool level_ = false;  // under the router's mutex
};

IrqRouter::IrqRouter(Pic* pic, Ioapic* ioapic, InterruptChips* engine)
    : pic_(pic), ioapic_(ioapic), engine_(engine) {
    for (unsigned pin = 0; pin < kGsis; ++pin)
        pic_irq_[pin] = pin < 16 ? static_cast<u8>(pin) : kNoPic;
    pic_irq_[0] = kNoPic;  // pin 0 is not wired
    pic_irq_[kTimerPin] = 0;
}

std::unique_ptr<IrqLine> IrqRouter::line(unsigned gsi) {
    if (gsi >= kGsis) {
        throw ConfigError("gsi", "GSI " + std::to_string(gsi) + " does not exist; a PC has 0 to " +
                                     std::to_string(kGsis - 1));
    }
    return std::make_unique<Source>(*this, pin_of(gsi));
}

void IrqRouter::route_pci(unsigned gsi, u8 pic_irq) {
    if (gsi < 16 || gsi >= kGsis || (pic_irq > 15 && pic_irq != kNoPic) || pic_irq == 2) {
        throw ConfigError("gsi", "GSI " + std::to_string(gsi) + " cannot drive 8259 input " +
                                     std::to_string(pic_irq) +
                                     "; only GSIs 16 to 23 can be routed, and not to input 2");
    }
    std::lock_guard lock(mutex_);
    u8 before = pic_irq_[gsi];
    pic_irq_[gsi] = pic_irq;
    if (before != kNoPic) drive_pic(before);
    drive(gsi);
}

void IrqRouter::refresh() {
    std::lock_guard lock(mutex_);
    for (unsigned pin = 0; pin < kGsis; ++pin) drive(pin);
}

void IrqRouter::change(unsigned pin, bool active) {
    u32 before = active_[pin];
    active_[pin] += active ? 1 : -1;
    if ((before == 0) != (active_[pin] == 0)) drive(pin);
}

bool IrqRouter::pic_level(u8 irq) const {
    for (unsigned pin = 0; pin < kGsis; ++pin) {
        if (pic_irq_[pin] == irq && active_[pin] != 0) return true;
    }
    return false;
}

void IrqRouter::drive_pic(u8 irq) {
    if (pic_ != nullptr) pic_->set_irq(irq, pic_level(irq));
    if (engine_ != nullptr) engine_->set_pic(irq, pic_level(irq));
}

void IrqRouter::drive(unsigned pin) {
    u8 irq = pic_irq_[pin];
    // An engine's GSI drives both chips. Where a PCI interrupt shares the 8259 input with an ISA
    // one, the input may fall for a moment and rise again, which level-triggered inputs do not
    // mind.
    if (engine_ != nullptr) engine_->set_gsi(pin == kTimerPin ? 0 : pin, active_[pin] != 0);
    if (irq != kNoPic) drive_pic(irq);
    if (ioapic_ != nullptr) ioapic_->set_irq(pin, active_[pin] != 0);
}

}  // namespace polyvisor::irqchip
