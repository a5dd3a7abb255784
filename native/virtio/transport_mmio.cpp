#include "virtio/transport_mmio.hpp"

#include <cstring>

#include "base/error.hpp"
#include "bus/pod_state.hpp"
#include "virtio/feature_words.hpp"

namespace polyvisor::virtio {

namespace {

constexpr u32 kMagicValue = 0x74726976, kVersion = 2, kVendorId = 0x1af4;
constexpr u32 kInterruptQueue = 1, kInterruptConfig = 2;

// Offsets of the registers (4.2.2).
enum Register : u32 {
    kMagicRegister = 0x00,
    kVersionRegister = 0x04,
    kDeviceId = 0x08,
    kVendor = 0x0c,
    kDeviceFeatures = 0x10,
    kDeviceFeaturesSelect = 0x14,
    kDriverFeatures = 0x20,
    kDriverFeaturesSelect = 0x24,
    kQueueSelect = 0x30,
    kQueueSizeMax = 0x34,
    kQueueSize = 0x38,
    kQueueReady = 0x44,
    kQueueNotify = 0x50,
    kInterruptStatus = 0x60,
    kInterruptAcknowledge = 0x64,
    kStatusRegister = 0x70,
    kQueueDescriptors = 0x80,
    kQueueDriver = 0x90,
    kQueueDevice = 0xa0,
    kSharedLength = 0xb0,
    kQueueReset = 0xc0,
    kGeneration = 0xfc,
};

}  // namespace

MmioTransport::MmioTransport(std::shared_ptr<virtio::Device> device, std::unique_ptr<IrqLine> line,
                             EventLoop& loop)
    : device_(std::move(device)), line_(std::move(line)), doorbells_(*device_, loop) {
    device_->connect(this);
}

MmioTransport::~MmioTransport() {
    device_->reset();
    device_->connect(nullptr);
}

std::vector<Doorbell> MmioTransport::doorbells() const {
    return doorbells_.get([](unsigned queue) { return Doorbell{kQueueNotify, 4, true, queue}; });
}

// --- Interrupts ----------------------------------------------------------------------------------

void MmioTransport::queue_used(unsigned) {
    interrupt(kInterruptQueue);
}

void MmioTransport::config_changed() {
    interrupt(kInterruptConfig);
}

void MmioTransport::interrupt(u32 why) {
    std::lock_guard lock(mutex_);
    if (selected_.interrupts == 0) line_->set(true);
    selected_.interrupts |= why;
}

void MmioTransport::acknowledge(u32 which) {
    std::lock_guard lock(mutex_);
    selected_.interrupts &= ~which;
    if (selected_.interrupts == 0) line_->set(false);
}

MmioTransport::Selected MmioTransport::selected() const {
    std::lock_guard lock(mutex_);
    return selected_;
}

// --- Registers -----------------------------------------------------------------------------------

void MmioTransport::read(u64 offset, std::span<u8> data) {
    const u32 at = static_cast<u32>(offset);
    if (at >= kConfig) {
        device_->read_config(at - kConfig, data);
        return;
    }
    // Registers are read as a whole (4.2.2.2); anything else is a mistake that gets zeroes.
    std::memset(data.data(), 0, data.size());
    if (data.size() != 4 || at % 4 != 0) return;
    const u32 value = read_register(at);
    std::memcpy(data.data(), &value, sizeof value);
}

void MmioTransport::write(u64 offset, std::span<const u8> data) {
    const u32 at = static_cast<u32>(offset);
    if (at >= kConfig) {
        device_->write_config(at - kConfig, data);
        return;
    }
    if (data.size() != 4 || at % 4 != 0) return;
    u32 value;
    std::memcpy(&value, data.data(), sizeof value);
    write_register(at, value);
}

u32 MmioTransport::read_register(u32 offset) {
    const Selected selected = this->selected();
    const bool exists = selected.queue < device_->queues();
    switch (offset) {
        case kMagicRegister:
            return kMagicValue;
        case kVersionRegister:
            return kVersion;
        case kDeviceId:
            return device_->description().type;
        case kVendor:
            return kVendorId;
        case kDeviceFeatures:
            return word(device_->offered_features(), selected.device_features);
        case kQueueSizeMax:
            return exists ? device_->description().queue_sizes[selected.queue] : 0;
        case kQueueReady:
            return exists && device_->queue_enabled(selected.queue);
        case kInterruptStatus:
            return selected.interrupts;
        case kStatusRegister:
            return device_->status();
        case kSharedLength:
        case kSharedLength + 4:
            return ~u32{0};  // no shared memory over this transport
        case kGeneration:
            return device_->config_generation();
        default:
            return 0;
    }
}

void MmioTransport::write_register(u32 offset, u32 value) {
    u32 queue = 0;
    {
        std::lock_guard lock(mutex_);
        switch (offset) {
            case kDeviceFeaturesSelect:
                selected_.device_features = value;
                return;
            case kDriverFeaturesSelect:
                selected_.driver_features = value;
                return;
            case kQueueSelect:
                selected_.queue = value;
                return;
            default:
                queue = selected_.queue;
        }
    }
    switch (offset) {
        case kDriverFeatures: {
            const u32 select = selected().driver_features;
            if (select < 2) {
                device_->set_driver_features(with_word(device_->driver_features(), select, value));
            }
            return;
        }
        case kQueueNotify:
            device_->kick(value);
            return;
        case kInterruptAcknowledge:
            acknowledge(value);
            return;
        case kStatusRegister:
            device_->set_status(static_cast<u8>(value));
            if (static_cast<u8>(value) == 0) acknowledge(~u32{0});
            return;
        default:
            break;
    }
    if (queue >= device_->queues()) return;
    QueueConfig config = device_->queue_config(queue);
    switch (offset) {
        case kQueueSize:
            config.size = value;
            break;
        case kQueueDescriptors:
        case kQueueDescriptors + 4:
            config.descriptors = with_word(config.descriptors, offset / 4 % 2, value);
            break;
        case kQueueDriver:
        case kQueueDriver + 4:
            config.driver = with_word(config.driver, offset / 4 % 2, value);
            break;
        case kQueueDevice:
        case kQueueDevice + 4:
            config.device = with_word(config.device, offset / 4 % 2, value);
            break;
        case kQueueReady:
            value == 1 ? device_->enable_queue(queue) : device_->reset_queue(queue);
            return;
        case kQueueReset:
            if (value == 1) device_->reset_queue(queue);
            return;
        default:
            return;
    }
    device_->set_queue_config(queue, config);
}

// --- State ---------------------------------------------------------------------------------------

void MmioTransport::reset() {
    device_->reset();
    acknowledge(~u32{0});
    std::lock_guard lock(mutex_);
    selected_ = {};
}

std::vector<u8> MmioTransport::save() const {
    std::vector<u8> bytes = save_pod(selected());
    const auto device = device_->save();
    bytes.insert(bytes.end(), device.begin(), device.end());
    return bytes;
}

void MmioTransport::restore(std::span<const u8> state) {
    const auto own = state.first(std::min(state.size(), sizeof(Selected)));
    const Selected selected = load_pod<Selected>(own, name());
    check_state((selected.interrupts & ~(kInterruptQueue | kInterruptConfig)) == 0, name(),
                "interrupts");
    device_->restore(state.subspan(own.size()));
    std::lock_guard lock(mutex_);
    selected_ = selected;
    line_->set(selected_.interrupts != 0);
}

}  // namespace polyvisor::virtio
