#include "pci/function.hpp"

#include <cstring>

#include "base/error.hpp"

namespace polyvisor::pci {

namespace {

constexpr u16 kCommandWritable =
    kCommandIo | kCommandMemory | kCommandMaster | kCommandIntxDisable | 0x140;  // parity, SERR

bool is_memory64(BarKind kind) {
    return kind == BarKind::kMemory64 || kind == BarKind::kMemory64Prefetchable;
}

u32 kind_bits(BarKind kind) {
    switch (kind) {
        case BarKind::kIo:
            return 1;
        case BarKind::kMemory32:
            return 0;
        case BarKind::kMemory64:
            return 4;
        case BarKind::kMemory64Prefetchable:
            return 0xc;
    }
    return 0;
}

u16 bar_offset(unsigned index) {
    return static_cast<u16>(kBar0 + 4 * index);
}

}  // namespace

Function::Function(std::string name, const Identity& identity) : name_(std::move(name)) {
    space_.set16(kVendorId, identity.vendor);
    space_.set16(kDeviceId, identity.device);
    space_.set8(kRevision, identity.revision);
    space_.set8(kClassCode, static_cast<u8>(identity.class_code));
    space_.set16(kClassCode + 1, static_cast<u16>(identity.class_code >> 8));
    space_.set16(kSubsystemVendorId, identity.subsystem_vendor);
    space_.set16(kSubsystemId, identity.subsystem);
    space_.set_writable(kCommand, kCommandWritable, 2);
    space_.set_writable(0x0c, 0xff, 1);  // cache line size: kept, without effect
    space_.set_writable(kInterruptLine, 0xff, 1);
}

Function::~Function() {
    unplug();
}

void Function::add_bar(unsigned index, BarKind kind, u64 size, std::shared_ptr<Device> target) {
    bool wide = is_memory64(kind);
    u64 smallest = kind == BarKind::kIo ? 4 : 16;
    u64 largest = kind == BarKind::kIo ? 256 : wide ? bit(40) : bit(31);
    std::string what = "BAR " + std::to_string(index) + " of PCI device '" + name_ + "'";
    if (index + (wide ? 1 : 0) >= kBars) throw ConfigError("bar", what + " does not exist");
    bool taken = bars_[index].size != 0 || (wide && bars_[index + 1].size != 0) ||
                 (index > 0 && bars_[index - 1].size != 0 && is_memory64(bars_[index - 1].kind));
    if (taken) throw ConfigError("bar", what + " is already in use");
    if (!std::has_single_bit(size) || size < smallest || size > largest) {
        throw ConfigError("bar", what + " has " + std::to_string(size) +
                                     " bytes, which is not a power of two from " +
                                     std::to_string(smallest) + " to " + std::to_string(largest));
    }
    bars_[index].size = size;
    bars_[index].kind = kind;
    bars_[index].target = std::move(target);
    u64 writable = ~(size - 1);
    space_.set32(bar_offset(index), kind_bits(kind));
    space_.set_writable(bar_offset(index), static_cast<u32>(writable), 4);
    if (wide) {
        space_.set_writable(bar_offset(index + 1), static_cast<u32>(writable >> 32), 4);
    }
}

void Function::set_interrupt(u8 pin, std::unique_ptr<IrqLine> line) {
    space_.set8(kInterruptPin, pin);
    intx_line_ = std::move(line);
}

u16 Function::add_capability(u8 id, std::span<const u8> body, std::span<const u8> writable) {
    return space_.add_capability(id, body, writable);
}

void Function::plug(Bus* pio, Bus* mmio) {
    std::lock_guard lock(mutex_);
    pio_ = pio;
    mmio_ = mmio;
    power_on_ = space_.state();
    update_bars();
}

void Function::unplug() {
    std::lock_guard lock(mutex_);
    space_.set16(kCommand, 0);
    update_bars();
    pio_ = mmio_ = nullptr;
}

u64 Function::bar_register(unsigned index) const {
    u64 value = space_.get32(bar_offset(index));
    if (is_memory64(bars_[index].kind)) {
        value |= static_cast<u64>(space_.get32(bar_offset(index + 1))) << 32;
    }
    return value & ~(bars_[index].size - 1);
}

// Makes the buses agree with the BARs and the command register. A BAR that the guest puts where it
// does not fit (over another device, beyond the bus) is simply not decoded.
void Function::update_bars() {
    u16 command = space_.get16(kCommand);
    for (unsigned i = 0; i < kBars; ++i) {
        Bar& bar = bars_[i];
        if (bar.size == 0) continue;
        Bus* bus = bar.kind == BarKind::kIo ? pio_ : mmio_;
        bool decode =
            bus != nullptr && (command & (bar.kind == BarKind::kIo ? kCommandIo : kCommandMemory));
        u64 address = bar_register(i);
        if (bar.mapped && (!decode || bar.at != address)) {
            (bar.kind == BarKind::kIo ? pio_ : mmio_)->detach(bar.at);
            bar.mapped = false;
        }
        if (!decode || bar.mapped || address == 0) continue;
        try {
            bus->attach(address, bar.size, bar.target);
            bar.mapped = true;
            bar.at = address;
        } catch (const MemoryRangeError&) {
        }
    }
}

// After the command register changed. INTx has a mutex of its own, as devices drive it with
// mutexes held that an access to the configuration space may want.
void Function::update_intx() {
    std::lock_guard lock(intx_mutex_);
    intx_disabled_ = space_.get16(kCommand) & kCommandIntxDisable;
    if (intx_line_) intx_line_->set(intx_ && !intx_disabled_);
}

void Function::set_intx(bool level) {
    std::lock_guard lock(intx_mutex_);
    if (intx_ == level) return;
    intx_ = level;
    if (intx_line_) intx_line_->set(intx_ && !intx_disabled_);
}

bool Function::intx() const {
    std::lock_guard lock(intx_mutex_);
    return intx_;
}

u32 Function::config_read(u16 offset, unsigned size) {
    std::lock_guard lock(mutex_);
    const u16 status = space_.get16(kStatus);
    space_.set16(kStatus,
                 static_cast<u16>(intx() ? status | kStatusInterrupt : status & ~kStatusInterrupt));
    config_about_to_read(offset, size);
    return space_.read(offset, size);
}

void Function::config_write(u16 offset, u32 value, unsigned size) {
    std::lock_guard lock(mutex_);
    space_.write(offset, value, size);
    if (offset < kBar0 + 4 * kBars && offset + size > kCommand) {
        update_bars();
        update_intx();
    }
    config_written(offset, size);
}

Function::BarAddress Function::bar(unsigned index) const {
    std::lock_guard lock(mutex_);
    return {bar_register(index), bars_[index].mapped};
}

void Function::set_bar(unsigned index, u64 address) {
    std::lock_guard lock(mutex_);
    u16 offset = bar_offset(index);
    space_.write(offset, static_cast<u32>(address), 4);
    if (is_memory64(bars_[index].kind)) {
        space_.write(static_cast<u16>(offset + 4), static_cast<u32>(address >> 32), 4);
    }
    update_bars();
}

u16 Function::command() const {
    std::lock_guard lock(mutex_);
    return space_.get16(kCommand);
}

u8 Function::interrupt_pin() const {
    return space_.get8(kInterruptPin);
}

void Function::reset() {
    std::lock_guard lock(mutex_);
    space_.restore(power_on_);
    set_intx(false);
    reset_device();
    for (Bar& bar : bars_) {
        if (bar.target) bar.target->reset();
    }
    update_bars();
    update_intx();
}

// The space, the interrupt's level, then what the derived class keeps.
std::vector<u8> Function::save() const {
    std::lock_guard lock(mutex_);
    auto value = space_.state().value;
    value[kStatus] &= static_cast<u8>(~kStatusInterrupt);  // what it was when it was last read
    std::vector<u8> bytes(value.begin(), value.end());
    bytes.push_back(intx());
    auto device = save_device();
    bytes.insert(bytes.end(), device.begin(), device.end());
    return bytes;
}

void Function::restore(std::span<const u8> bytes) {
    if (bytes.size() < ConfigSpace::kSize + 1 || bytes[ConfigSpace::kSize] > 1) {
        throw StateError("size", "the saved state of PCI device '" + name_ +
                                     "' is damaged or of another version");
    }
    ConfigSpace::State state;
    std::memcpy(state.value.data(), bytes.data(), ConfigSpace::kSize);
    std::lock_guard lock(mutex_);
    ConfigSpace::State before = space_.state();
    space_.restore(state);
    try {
        restore_device(bytes.subspan(ConfigSpace::kSize + 1));
    } catch (...) {
        space_.restore(before);
        throw;
    }
    {
        std::lock_guard intx(intx_mutex_);
        intx_ = bytes[ConfigSpace::kSize];
    }
    update_bars();
    update_intx();
}

}  // namespace polyvisor::pci
