#include "virtio/transport_pci.hpp"

#include <bit>
#include <cstring>

#include "base/error.hpp"

namespace polyvisor::virtio {

namespace {

// cfg_type of the vendor capabilities (4.1.4).
enum CapabilityType : u8 {
    kCapCommon = 1,
    kCapNotify = 2,
    kCapIsr = 3,
    kCapDevice = 4,
    kCapWindow = 5,
    kCapShared = 8,
};
constexpr u8 kRegistersBar = 0, kMsixBar = 1, kSharedBar = 2;

// ISR status (4.1.4.5).
constexpr u8 kIsrQueue = 1, kIsrConfig = 2;

// The class that other software knows such a device by.
u32 class_of(u16 type) {
    switch (type) {
        case kNet:
            return 0x020000;
        case kBlock:
            return 0x010000;
        case kConsole:
            return 0x078000;
        case kVsock:
            return 0x028000;
        case kFs:
            return 0x018000;
        default:
            return 0x00ff00;
    }
}

pci::Identity identity(const Device& device) {
    const u16 type = device.description().type;
    pci::Identity result;
    result.vendor = PciTransport::kVendor;
    result.device = static_cast<u16>(PciTransport::kFirstDevice + type);
    result.class_code = class_of(type);
    result.revision = 1;
    result.subsystem_vendor = PciTransport::kVendor;
    result.subsystem = 0x1100;
    return result;
}

}  // namespace

// What BAR 0 leads to.
class PciTransport::Registers final : public polyvisor::Device {
  public:
    explicit Registers(PciTransport& transport) : transport_(transport) {}
    std::string_view name() const override { return transport_.device_->name(); }
    void read(u64 offset, std::span<u8> data) override { transport_.read_registers(offset, data); }
    void write(u64 offset, std::span<const u8> data) override {
        transport_.write_registers(offset, data);
    }
    std::vector<Doorbell> doorbells() const override {
        return transport_.doorbells_.get(
            [](unsigned queue) { return Doorbell{kNotify + kNotifyStep * queue}; });
    }

  private:
    PciTransport& transport_;
};

// Shared memory regions, one behind the other in BAR 2. An access is an exit each: what has to be
// quick belongs into the machine's memory.
class PciTransport::SharedMemory final : public polyvisor::Device {
  public:
    SharedMemory(std::string name, std::vector<SharedRegion> regions)
        : name_(std::move(name)), regions_(std::move(regions)) {}
    std::string_view name() const override { return name_; }
    void read(u64 offset, std::span<u8> data) override {
        u8* at = find(offset, data.size());
        if (at != nullptr) {
            std::memcpy(data.data(), at, data.size());
        } else {
            std::memset(data.data(), 0xff, data.size());
        }
    }
    void write(u64 offset, std::span<const u8> data) override {
        if (u8* at = find(offset, data.size())) std::memcpy(at, data.data(), data.size());
    }

  private:
    u8* find(u64 offset, u64 size) const {
        for (const SharedRegion& region : regions_) {
            const u64 length = region.mapping->size();
            if (offset < length) {
                return size <= length - offset ? region.mapping->data() + offset : nullptr;
            }
            offset -= length;
        }
        return nullptr;
    }

    std::string name_;
    std::vector<SharedRegion> regions_;
};

PciTransport::PciTransport(std::shared_ptr<virtio::Device> device, MsiSink& msi, EventLoop& loop)
    : Function(device->name(), identity(*device)),
      device_(std::move(device)),
      msix_(std::make_shared<pci::Msix>(msi, device_->queues() + 1)),
      doorbells_(*device_, loop),
      queue_vectors_(device_->queues()) {
    if (device_->queues() > kBlock / kNotifyStep) {
        throw ConfigError("queues", name() + " has " + std::to_string(device_->queues()) +
                                        " queues; over PCI there can be " +
                                        std::to_string(kBlock / kNotifyStep));
    }
    for (auto& vector : queue_vectors_) vector = kNoVector;
    add_registers();
    add_shared_memory();
    device_->connect(this);
}

PciTransport::~PciTransport() {
    device_->reset();
    device_->connect(nullptr);
}

void PciTransport::add_registers() {
    add_bar(kRegistersBar, pci::BarKind::kMemory32, 4 * kBlock, std::make_shared<Registers>(*this));
    add_bar(kMsixBar, pci::BarKind::kMemory32, msix_->bar_size(), msix_);
    const auto body = msix_->capability(kMsixBar);
    msix_capability_ =
        Function::add_capability(pci::kCapMsix, body, pci::Msix::kCapabilityWritable);
    add_capability(kCapCommon, kRegistersBar, kCommon, kCommonBytes);
    constexpr u8 kStep[] = {kNotifyStep, 0, 0, 0};
    add_capability(kCapNotify, kRegistersBar, kNotify, kBlock, kStep);
    add_capability(kCapIsr, kRegistersBar, kIsr, 1);
    if (device_->description().config_size != 0) {
        add_capability(kCapDevice, kRegistersBar, kConfig, kBlock);
    }
    // A window to the registers for software that cannot reach BARs: bar, offset and length are the
    // driver's, and so are the four bytes of data behind them (4.1.4.9).
    constexpr u8 kWindow[18] = {2 + sizeof kWindow, kCapWindow};
    constexpr u8 kWritable[18] = {0,    0,    0xff, 0,    0,    0,    0xff, 0xff, 0xff,
                                  0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
    window_capability_ = Function::add_capability(pci::kCapVendor, kWindow, kWritable);
}

void PciTransport::add_shared_memory() {
    auto regions = device_->shared_regions();
    if (regions.empty()) return;
    u64 offset = 0;
    for (const SharedRegion& region : regions) {
        const u64 length = region.mapping->size();
        u32 high[] = {static_cast<u32>(offset >> 32), static_cast<u32>(length >> 32)};
        add_capability(kCapShared, kSharedBar, static_cast<u32>(offset), static_cast<u32>(length),
                       {reinterpret_cast<const u8*>(high), sizeof high}, region.id);
        offset += length;
    }
    add_bar(kSharedBar, pci::BarKind::kMemory64Prefetchable,
            std::max<u64>(std::bit_ceil(offset), kPageSize),
            std::make_shared<SharedMemory>(name(), std::move(regions)));
}

// struct virtio_pci_cap, behind its id and next bytes.
u16 PciTransport::add_capability(u8 type, u8 bar, u32 offset, u32 length, std::span<const u8> more,
                                 u8 id) {
    std::vector<u8> body = {static_cast<u8>(16 + more.size()), type, bar, id, 0, 0};
    for (u32 value : {offset, length}) {
        for (unsigned i = 0; i < 4; ++i) body.push_back(static_cast<u8>(value >> (8 * i)));
    }
    body.insert(body.end(), more.begin(), more.end());
    return Function::add_capability(pci::kCapVendor, body);
}

// --- Interrupts ----------------------------------------------------------------------------------

void PciTransport::queue_used(unsigned queue) {
    interrupt(queue_vectors_[queue].load(std::memory_order_acquire), kIsrQueue);
}

void PciTransport::config_changed() {
    interrupt(config_vector_.load(std::memory_order_acquire), kIsrConfig);
}

void PciTransport::interrupt(u16 vector, u8 isr) {
    if (msix_->enabled()) {
        if (vector != kNoVector) msix_->notify(vector);
        return;
    }
    isr_.fetch_or(isr, std::memory_order_acq_rel);
    set_intx(true);
}

// Reading the ISR status takes it, and takes the interrupt back. A bit that comes meanwhile drives
// the wire again.
u8 PciTransport::take_isr() {
    set_intx(false);
    return isr_.exchange(0, std::memory_order_acq_rel);
}

u16 PciTransport::valid_vector(u32 value) const {
    return value < msix_->vectors() ? static_cast<u16>(value) : kNoVector;
}

// --- Configuration space -------------------------------------------------------------------------

// The data of the window: an access to what the driver has aimed it at.
void PciTransport::config_about_to_read(u16 offset, unsigned size) {
    const u16 data = static_cast<u16>(window_capability_ + 16);
    if (offset + size <= data || offset >= data + 4) return;
    const u32 at = space().get32(static_cast<u16>(window_capability_ + 8));
    const u32 length = space().get32(static_cast<u16>(window_capability_ + 12));
    const u8 bar = space().get8(static_cast<u16>(window_capability_ + 4));
    if (bar != kRegistersBar || length > 4 || at >= 4 * kBlock) return;
    u8 bytes[4] = {};
    read_registers(at, std::span(bytes).first(length));
    for (unsigned i = 0; i < 4; ++i) space().set8(static_cast<u16>(data + i), bytes[i]);
}

void PciTransport::config_written(u16 offset, unsigned size) {
    const u16 control = static_cast<u16>(msix_capability_ + 2);
    if (offset < control + 2 && offset + size > control) {
        msix_->set_control(space().get16(control));
    }
    const u16 data = static_cast<u16>(window_capability_ + 16);
    if (offset + size <= data || offset >= data + 4) return;
    const u32 at = space().get32(static_cast<u16>(window_capability_ + 8));
    const u32 length = space().get32(static_cast<u16>(window_capability_ + 12));
    const u8 bar = space().get8(static_cast<u16>(window_capability_ + 4));
    if (bar != kRegistersBar || (length != 1 && length != 2 && length != 4) || at >= 4 * kBlock) {
        return;
    }
    const u32 value = space().get32(data);
    write_registers(at, {reinterpret_cast<const u8*>(&value), length});
}

void PciTransport::reset_device() {
    device_->reset();
    msix_->reset();
    config_vector_ = kNoVector;
    for (auto& vector : queue_vectors_) vector = kNoVector;
    isr_ = 0;
    std::lock_guard lock(select_mutex_);
    selected_ = {};
}

// The selectors, ISR, vectors, then MSI-X and the device, each behind its length.
std::vector<u8> PciTransport::save_device() const {
    std::vector<u8> bytes;
    auto append = [&bytes](const void* from, std::size_t size) {
        const u8* at = static_cast<const u8*>(from);
        bytes.insert(bytes.end(), at, at + size);
    };
    {
        std::lock_guard lock(select_mutex_);
        append(&selected_, sizeof selected_);
    }
    const u16 isr = isr_.load(), config_vector = config_vector_.load();
    append(&isr, sizeof isr);
    append(&config_vector, sizeof config_vector);
    for (const auto& vector : queue_vectors_) {
        const u16 value = vector.load();
        append(&value, sizeof value);
    }
    for (const auto& part : {msix_->save(), device_->save()}) {
        const u32 size = static_cast<u32>(part.size());
        append(&size, sizeof size);
        append(part.data(), part.size());
    }
    return bytes;
}

void PciTransport::restore_device(std::span<const u8> state) {
    auto take = [&](std::size_t size) {
        if (state.size() < size) {
            throw StateError("size", "the saved state of PCI device '" + name() + "' is cut short");
        }
        auto part = state.first(size);
        state = state.subspan(size);
        return part;
    };
    auto number = [&]<class T>(T) {
        T value;
        std::memcpy(&value, take(sizeof value).data(), sizeof value);
        return value;
    };
    const Selected selected = number(Selected());
    const u16 isr = number(u16{});
    const u16 config_vector = valid_vector(number(u16{}));
    std::vector<u16> vectors;
    for (unsigned i = 0; i < device_->queues(); ++i) {
        vectors.push_back(valid_vector(number(u16{})));
    }
    const auto msix = take(number(u32{}));
    const auto device = take(number(u32{}));
    const auto before = msix_->save();
    msix_->restore(msix);
    try {
        device_->restore(device);
    } catch (...) {
        msix_->restore(before);
        throw;
    }
    isr_ = static_cast<u8>(isr & (kIsrQueue | kIsrConfig));
    config_vector_ = config_vector;
    for (std::size_t i = 0; i < vectors.size(); ++i) queue_vectors_[i] = vectors[i];
    std::lock_guard lock(select_mutex_);
    selected_ = selected;
}

}  // namespace polyvisor::virtio
