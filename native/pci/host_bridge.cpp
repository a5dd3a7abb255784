#include "pci/host_bridge.hpp"

#include <cstring>

#include "base/error.hpp"
#include "bus/pod_state.hpp"

namespace polyvisor::pci {

namespace {

constexpr u32 kAddressEnable = 1u << 31;

u32 ones(unsigned size) {
    return size >= 4 ? ~0u : (1u << (8 * size)) - 1;
}

void spread(u32 value, std::span<u8> data) {
    for (std::size_t i = 0; i < data.size(); ++i) {
        data[i] = i < 4 ? static_cast<u8>(value >> (8 * i)) : 0xff;
    }
}

u32 gather(std::span<const u8> data) {
    u32 value = 0;
    std::memcpy(&value, data.data(), std::min<std::size_t>(data.size(), sizeof value));
    return value;
}

// Only naturally aligned accesses of 1, 2 and 4 bytes reach a configuration space.
bool regular(u64 offset, std::size_t size) {
    return (size == 1 || size == 2 || size == 4) && offset % size == 0;
}

}  // namespace

HostBridge::HostBridge(Bus& pio, Bus& mmio) : pio_(pio), mmio_(mmio) {
    slots_[0] = std::make_shared<Function>("host-bridge", kIdentity);
    slots_[0]->plug(&pio_, &mmio_);
}

HostBridge::~HostBridge() {
    for (auto& function : slots_) {
        if (function) function->unplug();
    }
}

unsigned HostBridge::plug(std::shared_ptr<Function> function, int slot) {
    unsigned at = 1;
    {
        std::lock_guard lock(mutex_);
        if (slot < 0) {
            while (at < kSlots && slots_[at]) ++at;
            if (at == kSlots) {
                throw ConfigError("slot",
                                  "PCI device '" + function->name() +
                                      "' finds no free slot: bus 0 has 31 and all are taken");
            }
        } else {
            at = static_cast<unsigned>(slot);
            if (at == 0 || at >= kSlots || slots_[at]) {
                throw ConfigError(
                    "slot", "PCI device '" + function->name() + "' cannot use slot " +
                                std::to_string(slot) +
                                (at > 0 && at < kSlots ? ": it is taken" : ": slots are 1 to 31"));
            }
        }
        slots_[at] = function;
    }
    function->plug(&pio_, &mmio_);
    return at;
}

std::shared_ptr<Function> HostBridge::function(unsigned slot) const {
    std::lock_guard lock(mutex_);
    return slot < kSlots ? slots_[slot] : nullptr;
}

unsigned HostBridge::free_slot() const {
    unsigned slot = 1;
    while (slot < kSlots && function(slot)) ++slot;
    return slot;
}

u32 HostBridge::config_read(unsigned bus, unsigned slot, unsigned function, u16 offset,
                            unsigned size) {
    std::shared_ptr<Function> target;
    if (bus == 0 && function == 0) target = this->function(slot);
    if (!target) return ones(size);
    // Without PCI Express there is nothing beyond 256 bytes, and what is not there reads as zero.
    return offset < ConfigSpace::kSize ? target->config_read(offset, size) : 0;
}

void HostBridge::config_write(unsigned bus, unsigned slot, unsigned function, u16 offset, u32 value,
                              unsigned size) {
    std::shared_ptr<Function> target;
    if (bus == 0 && function == 0) target = this->function(slot);
    if (target && offset < ConfigSpace::kSize) target->config_write(offset, value, size);
}

void HostBridge::assign(u64 pio_base, u64 mmio_base, u64 mmio_end,
                        const std::array<u8, 4>& pic_irqs) {
    u64 next_port = pio_base, next_address = mmio_base;
    for (unsigned slot = 0; slot < kSlots; ++slot) {
        auto target = function(slot);
        if (!target) continue;
        u16 command = kCommandMaster;
        for (unsigned i = 0; i < Function::kBars; ++i) {
            u64 size = target->bar_size(i);
            if (size == 0) continue;
            bool io = target->bar_kind(i) == BarKind::kIo;
            u64& next = io ? next_port : next_address;
            u64 at = align_up(next, size);
            if (at + size > (io ? pio_.limit() : mmio_end)) {
                throw ConfigError("bar", "BAR " + std::to_string(i) + " of PCI device '" +
                                             target->name() + "' (" + std::to_string(size) +
                                             " bytes) does not fit into the space for PCI " +
                                             (io ? "ports" : "memory"));
            }
            target->set_bar(i, at);
            next = at + size;
            command |= io ? kCommandIo : kCommandMemory;
        }
        u8 pin = target->interrupt_pin();
        if (pin != 0) target->config_write(kInterruptLine, pic_irqs[(slot + pin - 1) % 4], 1);
        target->config_write(kCommand, command, 2);
    }
}

void HostBridge::reset() {
    for (unsigned slot = 0; slot < kSlots; ++slot) {
        if (auto target = function(slot)) target->reset();
    }
}

// For each function: slot, length (4 bytes, little-endian), its bytes.
std::vector<u8> HostBridge::save() const {
    std::vector<u8> bytes;
    for (unsigned slot = 0; slot < kSlots; ++slot) {
        auto target = function(slot);
        if (!target) continue;
        auto state = target->save();
        bytes.push_back(static_cast<u8>(slot));
        for (unsigned i = 0; i < 4; ++i) bytes.push_back(static_cast<u8>(state.size() >> (8 * i)));
        bytes.insert(bytes.end(), state.begin(), state.end());
    }
    return bytes;
}

void HostBridge::restore(std::span<const u8> bytes) {
    std::vector<std::pair<std::shared_ptr<Function>, std::span<const u8>>> parts;
    while (!bytes.empty()) {
        auto target = function(bytes[0]);
        u64 size = bytes.size() < 5 ? ~u64{0} : gather(bytes.subspan(1, 4));
        if (!target || size > bytes.size() - 5) {
            throw StateError("pci", "the saved PCI state names slot " + std::to_string(bytes[0]) +
                                        ", where this machine has no such device");
        }
        parts.emplace_back(std::move(target), bytes.subspan(5, size));
        bytes = bytes.subspan(5 + size);
    }
    for (auto& [target, state] : parts) target->restore(state);
}

ConfigPorts::ConfigPorts(HostBridge& bridge, std::shared_ptr<Device> reset_control)
    : bridge_(bridge), reset_control_(std::move(reset_control)) {}

void ConfigPorts::read(u64 offset, std::span<u8> data) {
    u32 address = address_;
    unsigned size = static_cast<unsigned>(data.size());
    spread(~0u, data);
    if (offset == 1 && size == 1 && reset_control_) {
        reset_control_->read(0, data);
    } else if (offset < 4) {
        if (offset == 0 && size == 4) spread(address, data);
    } else if ((address & kAddressEnable) && regular(offset, size)) {
        u16 reg = static_cast<u16>((address & 0xfc) | (offset & 3));
        spread(bridge_.config_read(address >> 16 & 0xff, address >> 11 & 31, address >> 8 & 7, reg,
                                   size),
               data);
    }
}

void ConfigPorts::write(u64 offset, std::span<const u8> data) {
    unsigned size = static_cast<unsigned>(data.size());
    if (offset == 1 && size == 1 && reset_control_) {
        reset_control_->write(0, data);
        return;
    }
    if (offset < 4) {  // only a whole dword reaches CONFIG_ADDRESS
        if (offset == 0 && size == 4) address_ = gather(data) & (kAddressEnable | 0xfffffc);
        return;
    }
    u32 address = address_;
    if (!(address & kAddressEnable) || !regular(offset, size)) return;
    u16 reg = static_cast<u16>((address & 0xfc) | (offset & 3));
    bridge_.config_write(address >> 16 & 0xff, address >> 11 & 31, address >> 8 & 7, reg,
                         gather(data), size);
}

void ConfigPorts::reset() {
    address_ = 0;
    if (reset_control_) reset_control_->reset();
}

std::vector<u8> ConfigPorts::save() const {
    return save_pod<u32>(address_);
}

void ConfigPorts::restore(std::span<const u8> state) {
    address_ = load_pod<u32>(state, name()) & (kAddressEnable | 0xfffffc);
}

void Ecam::read(u64 offset, std::span<u8> data) {
    unsigned size = static_cast<unsigned>(data.size());
    spread(~0u, data);
    if (!regular(offset, size)) return;
    spread(bridge_.config_read(static_cast<unsigned>(offset >> 20), offset >> 15 & 31,
                               offset >> 12 & 7, offset & 0xfff, size),
           data);
}

void Ecam::write(u64 offset, std::span<const u8> data) {
    unsigned size = static_cast<unsigned>(data.size());
    if (!regular(offset, size)) return;
    bridge_.config_write(static_cast<unsigned>(offset >> 20), offset >> 15 & 31, offset >> 12 & 7,
                         offset & 0xfff, gather(data), size);
}

}  // namespace polyvisor::pci
