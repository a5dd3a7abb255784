// A device that echoes, and drivers that work it through the registers of either transport, as an
// operating system does.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bus/bus.hpp"
#include "pci/host_bridge.hpp"
#include "virtio/fake_driver.hpp"
#include "virtio/transport_mmio.hpp"
#include "virtio/transport_pci.hpp"

namespace pvtest {

using namespace polyvisor;
using namespace polyvisor::virtio;

/// Writes what it reads. Byte 0 of the configuration is the driver's, byte 1 the device's.
class Echo final : public virtio::Device {
  public:
    static constexpr u16 kSizes[] = {64, 16};
    explicit Echo(const Environment& environment)
        : Device(environment, {.type = 42,
                               .name = "virtio-echo",
                               .features = bit(0) | bit(50),
                               .queue_sizes = {kSizes[0], kSizes[1]},
                               .config_size = 6}) {
        mapping = Mapping(-1, 0, kPageSize);
    }
    std::vector<SharedRegion> shared_regions() const override { return {{7, &mapping}}; }
    void tell(u8 value) { set_config(1, value); }
    void break_down() { fail("it was told to"); }

    mutable Mapping mapping;
    int starts = 0, stops = 0, queue_stops = 0;

  private:
    void serve(unsigned, Queue& queue) override {
        drain(queue, chain_, [&] {
            std::vector<u8> bytes(chain_.readable_bytes());
            chain_.read(0, bytes);
            queue.push(chain_, chain_.write(0, bytes));
        });
    }
    void start(u64) override { ++starts; }
    void stop() override { ++stops; }
    void stop_queue(unsigned) override { ++queue_stops; }
    bool config_writable(u32 offset) const override { return offset == 0; }
    std::vector<u8> save_device() const override { return {0x5a}; }
    void restore_device(std::span<const u8> state) override {
        if (state.size() != 1 || state[0] != 0x5a) throw StateError("echo", "not an echo's state");
    }
    Chain chain_;
};

struct Messages final : MsiSink {
    void send(u64, u32 data) override { sent.push_back(data); }
    std::vector<u32> sent;
};

struct Wire final : IrqLine {
    explicit Wire(bool& level) : level(level) {}
    void set(bool value) override { level = value; }
    bool& level;
};

/// What a driver can do through any transport.
class Registers {
  public:
    virtual ~Registers() = default;
    virtual u64 features() = 0;
    virtual void set_features(u64 features) = 0;
    virtual u8 status() = 0;
    virtual void set_status(u8 status) = 0;
    virtual u32 queue_size(unsigned queue) = 0;
    virtual void set_queue(unsigned queue, const QueueConfig& config) = 0;
    virtual void reset_queue(unsigned queue) = 0;
    virtual bool queue_enabled(unsigned queue) = 0;
    virtual void notify(unsigned queue) = 0;
    /// Whether there was an interrupt for queues (1) or the configuration (2) since the last call.
    virtual u32 take_interrupts() = 0;
    virtual u8 config(u32 offset) = 0;
    virtual void set_config(u32 offset, u8 value) = 0;
    virtual u32 generation() = 0;
    virtual std::vector<u8> save() = 0;
    virtual void restore(std::span<const u8> state) = 0;
};

/// Memory, buses and the device, plugged into one of the transports.
class Board {
  public:
    static constexpr u64 kMmio = 0xfea00000, kBar = 0xc0000000;
    enum class Kind { kMmio, kPciIntx, kPciMsix };

    explicit Board(Kind kind);
    Registers& registers() { return *registers_; }
    u64 base() const { return base_; }

    GuestMemory memory;
    Clock clock{Clock::Mode::kFreeRunning};
    EventLoop loop{clock};
    Bus pio{"pio", 0x10000}, mmio{"mmio", bit(46)};
    Messages messages;
    bool wire = false;
    std::unique_ptr<pci::HostBridge> bridge;
    std::shared_ptr<Echo> echo;

    template <class T>
    T read(u64 address) {
        T value{};
        mmio.read(address, {reinterpret_cast<u8*>(&value), sizeof value});
        return value;
    }
    template <class T>
    void write(u64 address, T value) {
        mmio.write(address, {reinterpret_cast<const u8*>(&value), sizeof value});
    }

  private:
    u64 base_;
    std::unique_ptr<Registers> registers_;
};

class MmioRegisters final : public Registers {
  public:
    MmioRegisters(Board& board, std::shared_ptr<MmioTransport> transport)
        : board_(board), transport_(std::move(transport)) {}
    u64 features() override {
        set(0x14, 0);
        u64 low = get(0x10);
        set(0x14, 1);
        return low | static_cast<u64>(get(0x10)) << 32;
    }
    void set_features(u64 features) override {
        set(0x24, 0);
        set(0x20, static_cast<u32>(features));
        set(0x24, 1);
        set(0x20, static_cast<u32>(features >> 32));
    }
    u8 status() override { return static_cast<u8>(get(0x70)); }
    void set_status(u8 status) override { set(0x70, status); }
    u32 queue_size(unsigned queue) override { return set(0x30, queue), get(0x34); }
    void set_queue(unsigned queue, const QueueConfig& config) override {
        set(0x30, queue);
        set(0x38, config.size);
        const u64 places[] = {config.descriptors, config.driver, config.device};
        for (unsigned i = 0; i < 3; ++i) {
            set(0x80 + 0x10 * i, static_cast<u32>(places[i]));
            set(0x84 + 0x10 * i, static_cast<u32>(places[i] >> 32));
        }
        set(0x44, 1);
    }
    void reset_queue(unsigned queue) override { set(0x30, queue), set(0xc0, 1); }
    bool queue_enabled(unsigned queue) override { return set(0x30, queue), get(0x44) != 0; }
    void notify(unsigned queue) override { set(0x50, queue); }
    u32 take_interrupts() override {
        const u32 which = get(0x60);
        if (board_.wire != (which != 0)) return ~0u;
        set(0x64, which);
        return board_.wire ? ~0u : which;
    }
    u8 config(u32 offset) override { return board_.read<u8>(Board::kMmio + 0x100 + offset); }
    void set_config(u32 offset, u8 value) override {
        board_.write(Board::kMmio + 0x100 + offset, value);
    }
    u32 generation() override { return get(0xfc); }
    std::vector<u8> save() override { return transport_->save(); }
    void restore(std::span<const u8> state) override { transport_->restore(state); }

  private:
    u32 get(u32 offset) { return board_.read<u32>(Board::kMmio + offset); }
    void set(u32 offset, u32 value) { board_.write(Board::kMmio + offset, value); }
    Board& board_;
    std::shared_ptr<MmioTransport> transport_;
};

class PciRegisters final : public Registers {
  public:
    PciRegisters(Board& board, std::shared_ptr<PciTransport> transport, bool msix)
        : board_(board), transport_(std::move(transport)), msix_(msix) {}

    /// Offset in BAR 0 of the block that a capability of `type` names; and its own place.
    u32 find(u8 type, u16* place = nullptr) {
        for (u16 at = byte(0x34); at != 0; at = byte(at + 1)) {
            if (byte(at) == 0x09 && byte(at + 3) == type) {
                if (place != nullptr) *place = at;
                return dword(at + 8);
            }
        }
        return ~0u;
    }
    u8 byte(unsigned at) {
        return static_cast<u8>(transport_->config_read(static_cast<u16>(at), 1));
    }
    u32 dword(unsigned at) { return transport_->config_read(static_cast<u16>(at), 4); }
    void put(unsigned at, u32 value, unsigned size) {
        transport_->config_write(static_cast<u16>(at), value, size);
    }
    /// Vector n sends message 0x30 + n.
    void enable_msix() {
        u16 at = byte(0x34);
        while (at != 0 && byte(at) != 0x11) at = byte(at + 1);
        const u64 table = transport_->bar(1).address;
        for (unsigned vector = 0; vector < 3; ++vector) {
            board_.write(table + 16 * vector, u32{0xfee00000});
            board_.write(table + 16 * vector + 4, u32{0});
            board_.write(table + 16 * vector + 8, u32{0x30 + vector});
            board_.write(table + 16 * vector + 12, u32{0});
        }
        put(at + 2u, 0x8000, 2);
    }

    u64 features() override {
        set(0, u32{0});
        u64 low = get<u32>(4);
        set(0, u32{1});
        return low | static_cast<u64>(get<u32>(4)) << 32;
    }
    void set_features(u64 features) override {
        set(8, u32{0});
        set(12, static_cast<u32>(features));
        set(8, u32{1});
        set(12, static_cast<u32>(features >> 32));
    }
    u8 status() override { return get<u8>(0x14); }
    void set_status(u8 status) override { set(0x14, status); }
    u32 queue_size(unsigned queue) override { return select(queue), get<u16>(0x18); }
    void set_queue(unsigned queue, const QueueConfig& config) override {
        if (msix_) set(0x10, u16{0});  // the configuration's vector
        select(queue);
        set(0x18, static_cast<u16>(config.size));
        const u64 places[] = {config.descriptors, config.driver, config.device};
        for (unsigned i = 0; i < 3; ++i) {
            set(0x20 + 8 * i, static_cast<u32>(places[i]));
            set(0x24 + 8 * i, static_cast<u32>(places[i] >> 32));
        }
        if (msix_) set(0x1a, static_cast<u16>(queue + 1));
        set(0x1c, u16{1});
    }
    void reset_queue(unsigned queue) override { select(queue), set(0x3a, u16{1}); }
    bool queue_enabled(unsigned queue) override { return select(queue), get<u16>(0x1c) != 0; }
    void notify(unsigned queue) override {
        u16 place = 0;
        const u32 base = find(2, &place);
        select(queue);
        board_.write(bar() + base + get<u16>(0x1e) * dword(place + 16u), static_cast<u16>(queue));
    }
    u32 take_interrupts() override {
        if (!msix_) {
            const bool wire = board_.wire;
            const u8 isr = board_.read<u8>(bar() + find(3));
            return wire == (isr != 0) && !board_.wire ? isr : ~0u;
        }
        u32 which = 0;
        for (u32 data : board_.messages.sent) which |= data == 0x30 ? 2 : 1;
        board_.messages.sent.clear();
        return which;
    }
    u8 config(u32 offset) override { return board_.read<u8>(bar() + find(4) + offset); }
    void set_config(u32 offset, u8 value) override {
        board_.write(bar() + find(4) + offset, value);
    }
    u32 generation() override { return get<u8>(0x15); }
    std::vector<u8> save() override { return transport_->save(); }
    void restore(std::span<const u8> state) override { transport_->restore(state); }

    u64 bar() { return transport_->bar(0).address; }
    PciTransport& transport() { return *transport_; }

  private:
    template <class T>
    T get(u32 offset) {
        return board_.read<T>(bar() + find(1) + offset);
    }
    template <class T>
    void set(u32 offset, T value) {
        board_.write(bar() + find(1) + offset, value);
    }
    void select(unsigned queue) { set(0x16, static_cast<u16>(queue)); }
    Board& board_;
    std::shared_ptr<PciTransport> transport_;
    bool msix_;
};

inline Board::Board(Kind kind) {
    memory.add(Gpa(0), 16 << 20, "ram");
    echo = std::make_shared<Echo>(Environment{memory, loop});
    if (kind == Kind::kMmio) {
        auto transport = std::make_shared<MmioTransport>(echo, std::make_unique<Wire>(wire), loop);
        mmio.attach(kMmio, MmioTransport::kSize, transport);
        registers_ = std::make_unique<MmioRegisters>(*this, transport);
        base_ = kMmio;
        return;
    }
    bridge = std::make_unique<pci::HostBridge>(pio, mmio);
    auto transport = std::make_shared<PciTransport>(echo, messages, loop);
    transport->set_interrupt(1, std::make_unique<Wire>(wire));
    bridge->plug(transport);
    bridge->assign(0xc000, kBar, 0xe0000000, {10, 11, 10, 11});
    auto registers = std::make_unique<PciRegisters>(*this, transport, kind == Kind::kPciMsix);
    if (kind == Kind::kPciMsix) registers->enable_msix();
    base_ = transport->bar(0).address;
    registers_ = std::move(registers);
}

}  // namespace pvtest
