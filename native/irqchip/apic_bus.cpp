#include "irqchip/apic_bus.hpp"

#include "irqchip/ioapic.hpp"
#include "irqchip/lapic.hpp"

namespace polyvisor::irqchip {

Msi to_msi(const ApicMessage& message) {
    u64 address = 0xfee00000 | (message.destination & 0xff) << 12 | (message.logical ? 4 : 0);
    address |= static_cast<u64>(message.destination & ~0xffu) << 32;
    // The hint and a logical destination together ask for one of the CPUs named.
    if (message.logical && message.mode == DeliveryMode::kLowestPriority) address |= 8;
    u32 data = message.vector | static_cast<u32>(message.mode) << 8;
    if (message.assert_level) data |= 1u << 14;
    if (message.level_triggered) data |= 1u << 15;
    return {address, data};
}

void ApicBus::set_lint0(bool level) {
    for (Lapic* lapic : lapics_) lapic->set_lint(0, level);
}

void ApicBus::set_lint1(bool level) {
    for (Lapic* lapic : lapics_) lapic->set_lint(1, level);
}

bool ApicBus::deliver(const ApicMessage& message, u32 broadcast) {
    if (engine_ != nullptr) {
        Msi msi = to_msi(message);
        return engine_->send_msi(msi.address, msi.data);
    }
    if (message.mode != DeliveryMode::kLowestPriority) {
        bool accepted = false;
        for (Lapic* lapic : lapics_) {
            if (lapic->matches(message, broadcast)) accepted |= lapic->accept(message);
        }
        return accepted;
    }
    // The one with the lowest processor priority; those with equal priority take turns.
    Lapic* best = nullptr;
    u32 best_priority = ~0u;
    std::size_t count = lapics_.size();
    std::size_t first = round_robin_.fetch_add(1, std::memory_order_relaxed);
    for (std::size_t i = 0; i < count; ++i) {
        Lapic* lapic = lapics_[(first + i) % count];
        if (!lapic->matches(message, broadcast)) continue;
        u32 priority = lapic->arbitration_priority();
        if (priority < best_priority) {
            best = lapic;
            best_priority = priority;
        }
    }
    return best != nullptr && best->accept(message);
}

void ApicBus::deliver_to_all(const ApicMessage& message, const Lapic* except) {
    for (Lapic* lapic : lapics_) {
        if (lapic != except) lapic->accept(message);
    }
}

void ApicBus::send(u64 address, u32 data) {
    // SDM 3A 11.11.1: destination id 19:12, redirection hint 3, destination mode 2. The hint asks
    // for one of the CPUs named, which lowest-priority delivery does.
    constexpr u64 kWideDestination = 0xffffff00'00000000;
    u64 low = engine_ != nullptr ? address & ~kWideDestination : address;
    if (low >> 20 != 0xfee) {
        dropped_.fetch_add(1, std::memory_order_relaxed);
        return;
    }
    ApicMessage message;
    message.destination = static_cast<u32>(bits(address, 19, 12));
    bool hint = address & 8;
    message.logical =
        address & 4;  // hardware honours it without the hint too, and Linux relies on it
    message.mode = static_cast<DeliveryMode>(bits(data, 10, 8));
    if (hint && message.logical && message.mode == DeliveryMode::kFixed) {
        message.mode = DeliveryMode::kLowestPriority;
    }
    message.vector = static_cast<u8>(data);
    message.level_triggered = data & bit(15);
    message.assert_level = !message.level_triggered || (data & bit(14));
    if (message.mode == DeliveryMode::kReserved || message.mode == DeliveryMode::kStartUp ||
        !message.assert_level) {
        dropped_.fetch_add(1, std::memory_order_relaxed);
        return;
    }
    if (engine_ != nullptr) {
        engine_->send_msi(address, data);  // with the destination's upper bits, if it has any
    } else {
        deliver(message);
    }
}

void ApicBus::broadcast_eoi(u8 vector) {
    if (ioapic_ != nullptr) ioapic_->eoi(vector);
}

}  // namespace polyvisor::irqchip
