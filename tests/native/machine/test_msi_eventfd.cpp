// Rings of an event file descriptor become messages, by the event loop or by an engine's chips, and
// wait while there is nobody to send them.
#include "machine/msi_eventfd.hpp"

#include <unistd.h>

#include <atomic>
#include <vector>

#include "base/error.hpp"
#include "check.hpp"
#include "machine/pc.hpp"

using namespace polyvisor;

namespace {

struct Sink final : MsiSink {
    void send(u64 address, u32 data) override {
        last_address = address;
        last_data = data;
        ++sent;
    }
    std::atomic<int> sent{0};
    std::atomic<u64> last_address{0};
    std::atomic<u32> last_data{0};
    bool wait(int count) {
        for (int n = 0; n < 5000 && sent < count; ++n) ::usleep(1000);
        return sent == count;
    }
};

// An engine's chips that remember what they were told.
struct Chips final : InterruptChips {
    explicit Chips(IrqchipMode mode) : mode_(mode) {}
    IrqchipMode mode() const override { return mode_; }
    void set_gsi(unsigned gsi, bool level) override { gsis.push_back({gsi, level}); }
    void set_pic(unsigned irq, bool level) override { pics.push_back({irq, level}); }
    bool send_msi(u64 address, u32 data) override {
        messages.push_back({address, data});
        return true;
    }
    void connect_msi(int fd, u64 address, u32 data) override {
        if (refuse) throw HostError(28, "", "no room");
        connected = fd;
        messages.push_back({address, data});
    }
    void disconnect_msi(int fd) override {
        if (connected == fd) connected = -1;
    }
    void set_ioapic_pin(unsigned pin, u64 address, u32 data, bool enabled) override {
        if (enabled) pins.push_back({pin, irqchip::Msi{address, data}});
    }
    void set_eoi_handler(std::function<void(u8)> handler) override { eoi = std::move(handler); }
    std::vector<u8> save(Kind, u32) const override { return {}; }
    void restore(Kind, u32, std::span<const u8>) override {}

    IrqchipMode mode_;
    bool refuse = false;
    int connected = -1;
    std::vector<irqchip::Msi> messages;
    std::vector<std::pair<unsigned, bool>> gsis, pics;
    std::vector<std::pair<unsigned, irqchip::Msi>> pins;
    std::function<void(u8)> eoi;
};

void ring(const MsiEventfd& event) {
    u64 one = 1;
    CHECK(::write(event.fd(), &one, sizeof one) == sizeof one);
}

void by_the_event_loop() {
    Clock clock;
    EventLoop loop(clock);
    loop.start();
    Sink sink;
    {
        MsiEventfd event(sink, nullptr, loop);
        ring(event);
        CHECK(event.pending() && !event.connected());
        event.connect(0xfee00000, 0x41);  // what waited comes at once
        CHECK(sink.wait(1));
        CHECK_EQ(sink.last_data.load(), 0x41u);
        event.connect(0xfee01000, 0x42);
        ring(event);
        CHECK(sink.wait(2));
        CHECK_EQ(sink.last_address.load(), 0xfee01000u);
        CHECK_EQ(sink.last_data.load(), 0x42u);
        event.disconnect();
        event.disconnect();
        ring(event), ring(event);
        CHECK(event.pending());
        CHECK_EQ(sink.sent.load(), 2);
        event.connect(0xfee01000, 0x43);
        CHECK(sink.wait(3));  // one interrupt for both
        CHECK(!event.pending());
    }
    loop.stop();
}

void by_the_engine() {
    Clock clock;
    EventLoop loop(clock);
    Sink sink;
    Chips chips(IrqchipMode::kKernel);
    {
        MsiEventfd event(sink, &chips, loop);
        event.connect(0xfee00000, 0x41);
        CHECK_EQ(chips.connected, event.fd());
        event.disconnect();
        CHECK_EQ(chips.connected, -1);
        chips.refuse = true;
        CHECK_THROWS(event.connect(0xfee00000, 0x41), HostError);
        CHECK(!event.connected());
        chips.refuse = false;
        event.connect(0xfee00000, 0x42);
    }
    CHECK_EQ(chips.connected, -1);
    CHECK_EQ(sink.sent.load(), 0);
}

// --- The board around an engine's chips ----------------------------------------------------------

struct Cpu final : CpuSignals {
    void interrupt() override { ++interrupts; }
    void nmi() override {}
    void smi() override {}
    void init() override {}
    void sipi(u8) override {}
    int interrupts = 0;
};

struct Board {
    explicit Board(Chips& chips) {
        PcConfig config;
        config.chips = &chips;
        pc = std::make_unique<Pc>(config, clock, pio, mmio, log, [](StopInfo) {});
    }
    void out8(u64 port, u8 value) { CHECK(pio.write(port, {&value, 1})); }
    void ioapic(u32 index, u32 value) {
        mmio.write(PcLayout::kIoapic, {reinterpret_cast<const u8*>(&index), 4});
        mmio.write(PcLayout::kIoapic + 0x10, {reinterpret_cast<const u8*>(&value), 4});
    }
    Clock clock;
    Bus pio{"pio", 0x10000}, mmio{"mmio", bit(52)};
    Log log;
    std::unique_ptr<Pc> pc;
};

void board_without_chips() {
    Chips chips(IrqchipMode::kKernel);
    Board board(chips);
    CHECK(board.pc->interrupts(0) == nullptr);
    for (u64 port : {0x20, 0xa0, 0x40, 0x61, 0x4d0}) {
        u8 value = 0;
        CHECK(!board.pio.read(port, {&value, 1}));  // the engine's
    }
    auto line = board.pc->irqs().line(4), timer = board.pc->irqs().line(0);
    auto pci = board.pc->irqs().line(16);
    chips.gsis.clear();
    line->set(true);
    timer->set(true);
    CHECK(chips.gsis == (std::vector<std::pair<unsigned, bool>>{{4, true}, {0, true}}));
    chips.gsis.clear(), chips.pics.clear();
    pci->set(true);
    CHECK(chips.gsis == (std::vector<std::pair<unsigned, bool>>{{16, true}}));
    CHECK(chips.pics == (std::vector<std::pair<unsigned, bool>>{{10, true}}));
    board.pc->msi().send(0xfee02000, 0x55);
    board.pc->msi().send(0xfec00000, 0x56);  // no MSI
    CHECK(chips.messages == (std::vector<irqchip::Msi>{{0xfee02000, 0x55}}));
}

void split_board() {
    Chips chips(IrqchipMode::kSplit);
    Board board(chips);
    CHECK(board.pc->interrupts(1) == nullptr);
    LocalInterrupts* intr = board.pc->interrupts(0);
    CHECK(intr != nullptr);
    if (intr == nullptr) return;
    Cpu cpu;
    board.pc->connect(0, cpu);
    // The 8259s, initialised as a BIOS does, interrupt CPU 0.
    for (auto [port, value] : {std::pair<int, int>{0x20, 0x11},
                               {0x21, 0x08},
                               {0x21, 0x04},
                               {0x21, 0x01},
                               {0x21, 0x00}}) {
        board.out8(static_cast<u64>(port), static_cast<u8>(value));
    }
    auto line = board.pc->irqs().line(4), level = board.pc->irqs().line(20);
    CHECK(!intr->pending());
    line->set(true);
    CHECK(intr->pending());
    CHECK_EQ(cpu.interrupts, 1);
    CHECK_EQ(intr->acknowledge(), 0x0c);
    CHECK(!intr->pending());
    // The IOAPIC sends messages, and says what its level-triggered pins send.
    board.ioapic(0x10 + 2 * 20 + 1, 0x03000000);
    board.ioapic(0x10 + 2 * 20, 0x8000 | 0x71);
    CHECK(chips.pins ==
          (std::vector<std::pair<unsigned, irqchip::Msi>>{{20, {0xfee03000, 0xc071}}}));
    level->set(true);
    CHECK(chips.messages == (std::vector<irqchip::Msi>{{0xfee03000, 0xc071}}));
    chips.eoi(0x71);  // still asserted: again
    CHECK_EQ(chips.messages.size(), 2u);
    level->set(false);
    chips.eoi(0x71);
    CHECK_EQ(chips.messages.size(), 2u);
    board.pc.reset();
    CHECK(!chips.eoi);
}

}  // namespace

int main() {
    by_the_event_loop();
    by_the_engine();
    board_without_chips();
    split_board();
    return pvtest::finish("test_msi_eventfd");
}
