// The registers in BAR 0 of a virtio PCI function: the common block, ISR, configuration and
// notifications.
#include <cstring>

#include "virtio/feature_words.hpp"
#include "virtio/transport_pci.hpp"

namespace polyvisor::virtio {

namespace {

// Offsets in the common block (4.1.4.3).
enum Common : u32 {
    kDeviceFeatureSelect = 0x00,
    kDeviceFeature = 0x04,
    kDriverFeatureSelect = 0x08,
    kDriverFeature = 0x0c,
    kConfigVector = 0x10,
    kNumQueues = 0x12,
    kDeviceStatus = 0x14,
    kGeneration = 0x15,
    kQueueSelect = 0x16,
    kQueueSize = 0x18,
    kQueueVector = 0x1a,
    kQueueEnable = 0x1c,
    kQueueNotifyOffset = 0x1e,
    kQueueDescriptors = 0x20,
    kQueueDriver = 0x28,
    kQueueDevice = 0x30,
    kQueueNotifyData = 0x38,
    kQueueReset = 0x3a,
};
}  // namespace

void PciTransport::read_registers(u64 offset, std::span<u8> data) {
    const u32 at = static_cast<u32>(offset % kBlock);
    std::memset(data.data(), 0, data.size());
    switch (static_cast<u32>(offset - at)) {
        case kCommon:
            read_common(at, data);
            break;
        case kIsr:
            if (at == 0 && !data.empty()) data[0] = take_isr();
            break;
        case kConfig:
            device_->read_config(at, data);
            break;
        default:;  // the notification registers are for writing
    }
}

void PciTransport::write_registers(u64 offset, std::span<const u8> data) {
    const u32 at = static_cast<u32>(offset % kBlock);
    switch (static_cast<u32>(offset - at)) {
        case kCommon: {
            u32 value = 0;
            std::memcpy(&value, data.data(), std::min<std::size_t>(data.size(), sizeof value));
            write_common(at, value, static_cast<unsigned>(data.size()));
            if (data.size() == 8) {  // both halves of an address
                std::memcpy(&value, data.data() + 4, sizeof value);
                write_common(at + 4, value, 4);
            }
            break;
        }
        case kConfig:
            device_->write_config(at, data);
            break;
        case kNotify:
            if (at % kNotifyStep == 0) device_->kick(at / kNotifyStep);
            break;
        default:;
    }
}

void PciTransport::read_common(u32 offset, std::span<u8> data) {
    // Each field by itself, and 64-bit ones by halves too: what is read is what lies there.
    for (std::size_t i = 0; i < data.size();) {
        const u32 at = offset + static_cast<u32>(i);
        const u32 wide = at >= kConfigVector && at < kQueueDescriptors
                             ? (at == kDeviceStatus || at == kGeneration ? 1 : 2)
                         : at >= kQueueNotifyData ? 2
                                                  : 4;
        const u32 start = at - at % wide;
        u64 value = common(start) >> (8 * (at - start));
        for (u32 left = wide - (at - start); left != 0 && i < data.size(); --left, ++i) {
            data[i] = static_cast<u8>(value);
            value >>= 8;
        }
    }
}

u64 PciTransport::common(u32 offset) {
    Selected selected;
    {
        std::lock_guard lock(select_mutex_);
        selected = selected_;
    }
    const u16 queue = selected.queue;
    const bool exists = queue < device_->queues();
    switch (offset) {
        case kDeviceFeatureSelect:
            return selected.device_features;
        case kDeviceFeature:
            return word(device_->offered_features(), selected.device_features);
        case kDriverFeatureSelect:
            return selected.driver_features;
        case kDriverFeature:
            return word(device_->driver_features(), selected.driver_features);
        case kConfigVector:
            return config_vector_.load();
        case kNumQueues:
            return device_->queues();
        case kDeviceStatus:
            return device_->status();
        case kGeneration:
            return static_cast<u8>(device_->config_generation());
        case kQueueSelect:
            return queue;
        default:
            break;
    }
    if (!exists) return 0;
    const QueueConfig config = device_->queue_config(queue);
    switch (offset) {
        case kQueueSize:
            return config.size;
        case kQueueVector:
            return queue_vectors_[queue].load();
        case kQueueEnable:
            return device_->queue_enabled(queue);
        case kQueueNotifyOffset:
            return queue;
        case kQueueDescriptors:
            return static_cast<u32>(config.descriptors);
        case kQueueDescriptors + 4:
            return config.descriptors >> 32;
        case kQueueDriver:
            return static_cast<u32>(config.driver);
        case kQueueDriver + 4:
            return config.driver >> 32;
        case kQueueDevice:
            return static_cast<u32>(config.device);
        case kQueueDevice + 4:
            return config.device >> 32;
        default:
            return 0;  // queue_reset reads as 0: a reset is over when its write is
    }
}

void PciTransport::write_common(u32 offset, u32 value, unsigned size) {
    Selected selected;
    {
        std::lock_guard lock(select_mutex_);
        switch (offset) {
            case kDeviceFeatureSelect:
                selected_.device_features = value;
                return;
            case kDriverFeatureSelect:
                selected_.driver_features = value;
                return;
            case kQueueSelect:
                selected_.queue = static_cast<u16>(value);
                return;
            default:
                selected = selected_;
        }
    }
    switch (offset) {
        case kDriverFeature:
            if (selected.driver_features < 2) {
                device_->set_driver_features(
                    with_word(device_->driver_features(), selected.driver_features, value));
            }
            return;
        case kConfigVector:
            config_vector_.store(valid_vector(value & 0xffff));
            return;
        case kDeviceStatus:
            device_->set_status(static_cast<u8>(value));
            if (static_cast<u8>(value) == 0) {
                config_vector_.store(kNoVector);
                for (auto& vector : queue_vectors_) vector.store(kNoVector);
                take_isr();
            }
            return;
        default:
            break;
    }
    const u16 queue = selected.queue;
    if (queue >= device_->queues()) return;
    switch (offset) {
        case kQueueSize: {
            QueueConfig config = device_->queue_config(queue);
            config.size = value & 0xffff;
            device_->set_queue_config(queue, config);
            break;
        }
        case kQueueVector:
            queue_vectors_[queue].store(valid_vector(value & 0xffff));
            break;
        case kQueueEnable:
            if ((value & 0xffff) == 1) device_->enable_queue(queue);
            break;
        case kQueueReset:
            if ((value & 0xffff) == 1) device_->reset_queue(queue);
            break;
        default:
            if (offset >= kQueueDescriptors && offset < kQueueNotifyData && size >= 4) {
                set_queue_address(offset, value);
            }
    }
}

void PciTransport::set_queue_address(u32 offset, u32 value) {
    unsigned queue;
    {
        std::lock_guard lock(select_mutex_);
        queue = selected_.queue;
    }
    QueueConfig config = device_->queue_config(queue);
    u64* const fields[] = {&config.descriptors, &config.driver, &config.device};
    u64& field = *fields[(offset - kQueueDescriptors) / 8];
    if (offset % 4 != 0) return;
    field = with_word(field, offset % 8 / 4, value);
    device_->set_queue_config(queue, config);
}

}  // namespace polyvisor::virtio
