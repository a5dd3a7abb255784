#include "kvm/chips.hpp"

#include "kvm/abi.hpp"

#include "kvm/ioctl.hpp"
#include "kvm/vm.hpp"

namespace polyvisor::kvm {

namespace {

constexpr unsigned kTimerPin = 2, kIsaGsis = 16, kPicInputs = 16, kCascade = 2;

// KVM takes whatever the low word says for an address of the APICs', and refuses some of the upper
// ones; a guest may write anything into an MSI's registers.
bool is_msi(u64 address) {
    return (address & 0xff'fff0'0000) == 0xfee0'0000;
}

// Reserved, and start-up: no device sends them, and KVM complains about the first in the host's
// log.
bool is_deliverable(u32 data) {
    u32 mode = data >> 8 & 7;
    return mode != 3 && mode != 6;
}

kvm_irq_routing_entry chip_entry(unsigned gsi, u32 chip, u32 pin) {
    kvm_irq_routing_entry entry{};
    entry.gsi = gsi;
    entry.type = KVM_IRQ_ROUTING_IRQCHIP;
    entry.u.irqchip.irqchip = chip;
    entry.u.irqchip.pin = pin;
    return entry;
}

kvm_irq_routing_entry pic_entry(unsigned gsi, unsigned input) {
    return chip_entry(gsi, input < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, input % 8);
}

kvm_irq_routing_entry msi_entry(unsigned gsi, u64 address, u32 data) {
    kvm_irq_routing_entry entry{};
    entry.gsi = gsi;
    entry.type = KVM_IRQ_ROUTING_MSI;
    entry.u.msi.address_lo = static_cast<u32>(address);
    entry.u.msi.address_hi = static_cast<u32>(address >> 32);
    entry.u.msi.data = data;
    return entry;
}

void add_chips(std::vector<kvm_irq_routing_entry>& table) {
    for (unsigned gsi = 0; gsi < Chips::kPins; ++gsi) {
        if (gsi == kCascade) continue;
        if (gsi < kIsaGsis) table.push_back(pic_entry(gsi, gsi));
        table.push_back(chip_entry(gsi, KVM_IRQCHIP_IOAPIC, gsi == 0 ? kTimerPin : gsi));
    }
    for (unsigned input = 0; input < kPicInputs; ++input) {
        if (input != kCascade) table.push_back(pic_entry(Chips::kPicGsi + input, input));
    }
}

void need(Vm& vm, int capability, const char* what) {
    if (vm.check(capability) != 0) return;
    throw EngineUnavailable("kvm", "version",
                            std::string("this host's KVM has no ") + what +
                                "; give the machine irqchip user, or engine soft");
}

void enable(Vm& vm, u32 capability, u64 argument) {
    kvm_enable_cap cap{};
    cap.cap = capability;
    cap.args[0] = argument;
    call_ioctl(vm.fd(), KVM_ENABLE_CAP, &cap);
}

}  // namespace

Chips::Chips(Vm& vm) : vm_(vm), kept_lapics_(vm.config().cpus) {
    need(vm, KVM_CAP_IRQCHIP, "interrupt chips");
    need(vm, KVM_CAP_IRQ_ROUTING, "interrupt routing (KVM_CAP_IRQ_ROUTING)");
    need(vm, KVM_CAP_SIGNAL_MSI, "message-signalled interrupts (KVM_CAP_SIGNAL_MSI)");
    need(vm, KVM_CAP_X2APIC_API, "32-bit APIC ids (KVM_CAP_X2APIC_API)");
    if (mode() == IrqchipMode::kSplit) {
        need(vm, KVM_CAP_SPLIT_IRQCHIP, "split irqchip");
        enable(vm, KVM_CAP_SPLIT_IRQCHIP, kPins);
    } else {
        need(vm, KVM_CAP_PIT2, "interval timer (KVM_CAP_PIT2)");
        call_ioctl(vm.fd(), KVM_CREATE_IRQCHIP, 0L);
        kvm_pit_config pit{};
        pit.flags = KVM_PIT_SPEAKER_DUMMY;  // port 0x61 too
        call_ioctl(vm.fd(), KVM_CREATE_PIT2, &pit);
    }
    // A message to 0xff is for every CPU, x2APIC mode or not, as with our own chips, unless there
    // is a CPU 255.
    u64 api = KVM_X2APIC_API_USE_32BIT_IDS;
    if (vm.config().cpus > 255) api |= KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    enable(vm, KVM_CAP_X2APIC_API, api);
    write_routes();
}

Chips::~Chips() = default;  // the kernel's chips and irqfds go with the VM's descriptor

IrqchipMode Chips::mode() const {
    return vm_.irqchip();
}

// --- Wires ---------------------------------------------------------------------------------------

void Chips::drive(unsigned gsi, bool level) {
    kvm_irq_level line{};
    line.irq = gsi;
    line.level = level;
    call_ioctl(vm_.fd(), KVM_IRQ_LINE, &line);
}

void Chips::set_gsi(unsigned gsi, bool level) {
    if (gsi >= kPins || gsi == kCascade) return;
    std::lock_guard lock(mutex_);
    u32 pin = 1u << (gsi == 0 ? kTimerPin : gsi), mask = 1u << gsi;
    // A wire that keeps its level is no event. KVM would take it for an edge after its IOAPIC was
    // restored, which does not know the levels of edge-triggered pins.
    if (((pin_wires_ & pin) != 0) == level) return;
    pin_wires_ ^= pin;
    if (gsi < kIsaGsis) pic_wires_ = level ? pic_wires_ | mask : pic_wires_ & ~mask;
    drive(gsi, level);
}

void Chips::set_pic(unsigned irq, bool level) {
    if (irq >= kPicInputs || irq == kCascade) return;
    std::lock_guard lock(mutex_);
    u32 mask = 1u << irq;
    if (((pic_wires_ & mask) != 0) == level) return;
    pic_wires_ ^= mask;
    drive(kPicGsi + irq, level);
}

// --- Messages ------------------------------------------------------------------------------------

bool Chips::send_msi(u64 address, u32 data) {
    if (!is_msi(address) || !is_deliverable(data)) return false;
    kvm_msi msi{};
    msi.address_lo = static_cast<u32>(address);
    msi.address_hi = static_cast<u32>(address >> 32);
    msi.data = data;
    // Negative: no CPU has such an id, or it is switched off. That is the guest's business.
    return try_ioctl(vm_.fd(), KVM_SIGNAL_MSI, &msi) > 0;
}

void Chips::connect_msi(int fd, u64 address, u32 data) {
    std::lock_guard lock(mutex_);
    Message message{address, data};
    auto known = irqfds_.find(fd);
    if (known != irqfds_.end()) {
        if (known->second.message == message) return;
        known->second.message = message;
        write_routes();
        return;
    }
    unsigned gsi = kFirstMsiGsi;
    std::vector<bool> used(irqfds_.size());
    for (const auto& [other, irqfd] : irqfds_) {
        if (irqfd.gsi - kFirstMsiGsi < used.size()) used[irqfd.gsi - kFirstMsiGsi] = true;
    }
    for (bool taken : used) {
        if (!taken) break;
        ++gsi;
    }
    irqfds_.emplace(fd, Irqfd{message, gsi});
    try {
        write_routes();
        kvm_irqfd request{};
        request.fd = static_cast<u32>(fd);
        request.gsi = gsi;
        call_ioctl(vm_.fd(), KVM_IRQFD, &request);
    } catch (const Error&) {
        irqfds_.erase(fd);
        throw;
    }
}

void Chips::disconnect_msi(int fd) {
    std::lock_guard lock(mutex_);
    auto known = irqfds_.find(fd);
    if (known == irqfds_.end()) return;
    kvm_irqfd request{};
    request.fd = static_cast<u32>(fd);
    request.gsi = known->second.gsi;
    request.flags = KVM_IRQFD_FLAG_DEASSIGN;
    irqfds_.erase(known);  // its route goes when the table is next written
    call_ioctl(vm_.fd(), KVM_IRQFD, &request);
}

void Chips::set_ioapic_pin(unsigned pin, u64 address, u32 data, bool enabled) {
    if (pin >= kPins) return;
    std::lock_guard lock(mutex_);
    // Writing the table makes every CPU of the host take notice, so a pin that is switched off
    // stays in it: drivers mask and unmask their pin at every interrupt. At worst an EOI of a
    // vector that was given away meanwhile exits for nothing.
    pins_[pin] = enabled && is_msi(address) ? Message{address, data} : Message{};
    if (pins_[pin] == Message{} || pins_[pin] == told_pins_[pin]) return;
    write_routes();
}

void Chips::write_routes() {
    std::vector<kvm_irq_routing_entry> table;
    if (mode() == IrqchipMode::kKernel) {
        add_chips(table);
    } else {
        for (unsigned pin = 0; pin < kPins; ++pin) {
            if (pins_[pin] != Message{}) {
                table.push_back(msi_entry(pin, pins_[pin].address, pins_[pin].data));
            }
        }
    }
    for (const auto& [fd, irqfd] : irqfds_) {
        if (is_msi(irqfd.message.address) && is_deliverable(irqfd.message.data)) {
            table.push_back(msi_entry(irqfd.gsi, irqfd.message.address, irqfd.message.data));
        }
    }
    WithEntries<kvm_irq_routing> routing(table.size());
    routing->nr = static_cast<u32>(table.size());
    std::copy(table.begin(), table.end(), routing->entries);
    call_ioctl(vm_.fd(), KVM_SET_GSI_ROUTING, routing.head());
    told_pins_ = pins_;
}

void Chips::set_eoi_handler(std::function<void(u8 vector)> handler) {
    std::lock_guard lock(mutex_);
    eoi_handler_ = std::move(handler);
}

void Chips::ended(u8 vector) {
    std::function<void(u8)> handler;
    {
        std::lock_guard lock(mutex_);
        handler = eoi_handler_;
    }
    if (handler) handler(vector);
}

}  // namespace polyvisor::kvm
