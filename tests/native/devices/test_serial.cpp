// 16550A, against National's PC16550D data sheet and what Linux's 8250 driver probes.
#include "devices/serial.hpp"

#include "base/error.hpp"
#include "check.hpp"
#include "devices/char_backends.hpp"
#include "ports.hpp"

using namespace polyvisor;
using namespace polyvisor::devices;

namespace {

enum : u64 { kData, kIer, kIir, kLcr, kMcr, kLsr, kMsr, kScr };
constexpr u64 kFcr = kIir;

// A sink that can be made to hold the transmitter back.
struct SlowSink final : CharSink {
    void write(std::span<const u8> bytes) override { text.append(bytes.begin(), bytes.end()); }
    bool ready() const override { return is_ready; }
    void set_ready_callback(std::function<void()> now) override { callback = std::move(now); }
    std::string text;
    bool is_ready = true;
    std::function<void()> callback;
};

struct Fixture {
    Fixture() : clock(Clock::Mode::kDeterministic), uart(clock, line, &sink) {
        out(uart, kMcr, u8{0x0b});  // DTR, RTS, OUT2
    }
    std::size_t feed(std::string_view text) {
        return uart.receive({reinterpret_cast<const u8*>(text.data()), text.size()});
    }
    void run_for(Nanoseconds ns) {
        clock.advance_to(clock.now() + ns);
        clock.run_expired();
    }
    Clock clock;
    Line line;
    SlowSink sink;
    Serial uart;
};

void reset_values() {
    Fixture f;
    f.uart.reset();
    CHECK_EQ(in(f.uart, kIer), 0x00);
    CHECK_EQ(in(f.uart, kIir), 0x01);
    CHECK_EQ(in(f.uart, kLcr), 0x00);
    CHECK_EQ(in(f.uart, kMcr), 0x00);
    CHECK_EQ(in(f.uart, kLsr), 0x60);
    CHECK_EQ(in(f.uart, kMsr), 0xb0);  // CTS, DSR, DCD: somebody is there
    out(f.uart, kScr, u8{0x5a});
    CHECK_EQ(in(f.uart, kScr), 0x5a);
    out(f.uart, kLsr, u8{0xff});
    CHECK_EQ(in(f.uart, kLsr), 0x60);
    out(f.uart, kIer, u8{0xff});
    CHECK_EQ(in(f.uart, kIer), 0x0f);
    out(f.uart, kMcr, u8{0xff});
    CHECK_EQ(in(f.uart, kMcr), 0x1f);
}

void divisor_latch() {
    Fixture f;
    out(f.uart, kLcr, u8{0x83});
    CHECK_EQ(in<u16>(f.uart, kData), 12);
    out<u16>(f.uart, kData, 1);
    CHECK_EQ(in<u16>(f.uart, kData), 1);
    CHECK_EQ(in(f.uart, kLcr), 0x83);
    out(f.uart, kLcr, u8{0x03});
    CHECK_EQ(in(f.uart, kIer), 0);
    CHECK_EQ(f.uart.state().divisor, 1);
    CHECK(f.sink.text.empty());
}

// What autoconfig() in Linux's 8250 driver does to tell a 16550A.
void linux_autoconfig() {
    Fixture f;
    out(f.uart, kIer, u8{0});
    CHECK_EQ(in(f.uart, kIer) & 0x0f, 0);
    out(f.uart, kIer, u8{0x0f});
    CHECK_EQ(in(f.uart, kIer) & 0x0f, 0x0f);
    out(f.uart, kIer, u8{0});
    out(f.uart, kMcr, u8{0x1a});  // loopback, RTS and OUT2
    CHECK_EQ(in(f.uart, kMsr) & 0xf0, 0x90);
    out(f.uart, kMcr, u8{0x0b});
    out(f.uart, kLcr, u8{0xbf});
    out(f.uart, kFcr, u8{0});
    out(f.uart, kLcr, u8{0});
    out(f.uart, kFcr, u8{1});
    CHECK_EQ(in(f.uart, kIir) >> 6, 3);  // 16550A
    // No 64-byte FIFO (16750).
    out(f.uart, kLcr, u8{0x80});
    out(f.uart, kFcr, u8{0x21});
    CHECK_EQ(in(f.uart, kIir) >> 5, 6);
    out(f.uart, kLcr, u8{0});
    // The THRE test: enabling the interrupt raises it, each time.
    out(f.uart, kIer, u8{2});
    CHECK_EQ(in(f.uart, kIir) & 0x0f, 2);
    out(f.uart, kIer, u8{0});
    out(f.uart, kIer, u8{2});
    CHECK_EQ(in(f.uart, kIir) & 0x0f, 2);
}

void transmit_batches() {
    Fixture f;
    for (char c : std::string("abc")) out(f.uart, kData, static_cast<u8>(c));
    CHECK_EQ(f.sink.text, "");
    CHECK_EQ(in(f.uart, kLsr), 0x60);
    out(f.uart, kData, u8{'\n'});
    CHECK_EQ(f.sink.text, "abc\n");
    out(f.uart, kData, u8{'$'});  // a prompt: no newline comes
    f.run_for(1'000'000);
    f.run_for(OutputBatch::kIdle);
    CHECK_EQ(f.sink.text, "abc\n$");
    for (std::size_t i = 0; i < OutputBatch::kBatch; ++i) out(f.uart, kData, u8{'x'});
    CHECK_EQ(f.sink.text.size(), 5 + OutputBatch::kBatch);
    out(f.uart, kData, u8{'!'});
    f.uart.flush();
    CHECK_EQ(f.sink.text.back(), '!');
    out(f.uart, kData, u8{'?'});
    f.run_for(2 * OutputBatch::kIdle);
    f.run_for(2 * OutputBatch::kIdle);
    CHECK_EQ(f.sink.text.back(), '?');
}

void transmit_interrupt() {
    Fixture f;
    out(f.uart, kFcr, u8{1});
    out(f.uart, kIer, u8{2});
    CHECK(f.line.level);
    CHECK_EQ(in(f.uart, kIir), 0xc2);
    CHECK(!f.line.level);  // reading IIR clears it
    CHECK_EQ(in(f.uart, kIir), 0xc1);
    out(f.uart, kData, u8{'a'});
    CHECK(f.line.level);
    CHECK_EQ(f.line.edges, 2);
    for (int i = 0; i < 15; ++i) out(f.uart, kData, u8{'b'});  // a burst is one interrupt
    CHECK_EQ(f.line.edges, 2);
    in(f.uart, kIir);
    // Without FIFOs every byte is an edge, whether or not IIR is read.
    out(f.uart, kFcr, u8{0});
    out(f.uart, kData, u8{'c'});
    out(f.uart, kData, u8{'d'});
    CHECK_EQ(f.line.edges, 4);
    // OUT2 gates the pin.
    out(f.uart, kMcr, u8{0x03});
    CHECK(!f.line.level);
    CHECK_EQ(in(f.uart, kIir), 0x02);
}

void back_pressure() {
    Fixture f;
    out(f.uart, kFcr, u8{1});
    out(f.uart, kIer, u8{2});
    in(f.uart, kIir);
    f.sink.is_ready = false;
    for (char c : std::string("0123456789abcdefLOST")) out(f.uart, kData, static_cast<u8>(c));
    CHECK_EQ(in(f.uart, kLsr) & 0x60, 0);  // a guest that looks waits here
    CHECK(!f.line.level);
    f.sink.callback();  // a false alarm
    CHECK_EQ(in(f.uart, kLsr) & 0x60, 0);
    f.sink.is_ready = true;
    f.sink.callback();
    CHECK_EQ(in(f.uart, kLsr) & 0x60, 0x60);
    CHECK(f.line.level);
    out(f.uart, kData, u8{'\n'});
    CHECK_EQ(f.sink.text, "0123456789abcdef\n");
    f.sink.is_ready = false;
    out(f.uart, kData, u8{'x'});
    out(f.uart, kFcr, u8{0x05});  // reset of the transmit FIFO
    CHECK_EQ(in(f.uart, kLsr) & 0x60, 0x60);
}

void receive_trigger_levels() {
    struct Row {
        u8 fcr;
        unsigned level;
    };
    for (Row row : {Row{0x01, 1}, Row{0x41, 4}, Row{0x81, 8}, Row{0xc1, 14}}) {
        Fixture f;
        out(f.uart, kFcr, row.fcr);
        out(f.uart, kIer, u8{1});
        CHECK_EQ(f.feed(std::string(row.level, 'r')), row.level);
        CHECK(f.line.level);
        CHECK_EQ(in(f.uart, kIir), 0xc4);
        CHECK_EQ(in(f.uart, kLsr), 0x61);
        for (unsigned i = 0; i < row.level; ++i) CHECK_EQ(in(f.uart, kData), 'r');
        CHECK(!f.line.level);
        CHECK_EQ(in(f.uart, kLsr), 0x60);
        CHECK_EQ(in(f.uart, kIir), 0xc1);
    }
}

void receive_timeout() {
    Fixture f;
    out(f.uart, kFcr, u8{0xc1});
    out(f.uart, kIer, u8{1});
    f.feed("ab");
    CHECK(f.line.level);
    CHECK_EQ(in(f.uart, kIir), 0xcc);
    CHECK_EQ(in(f.uart, kData), 'a');
    CHECK(!f.line.level);  // starts anew with each read
    f.run_for(1'000'000);
    CHECK(f.line.level);
    CHECK_EQ(in(f.uart, kIir), 0xcc);
    CHECK_EQ(in(f.uart, kData), 'b');
    f.run_for(1'000'000);
    CHECK(!f.line.level);
    CHECK_EQ(f.line.edges, 2);
    CHECK_EQ(in(f.uart, kData), 0);  // empty
}

void receive_without_overrun() {
    Fixture f;
    int room = 0;
    f.uart.set_room_callback([&] { ++room; });
    CHECK_EQ(f.uart.room(), 1u);
    CHECK_EQ(f.feed("ab"), 1u);  // no FIFO: one byte
    CHECK_EQ(f.feed("b"), 0u);
    CHECK_EQ(room, 0);
    CHECK_EQ(in(f.uart, kData), 'a');
    CHECK_EQ(room, 1);
    out(f.uart, kFcr, u8{1});
    CHECK_EQ(f.uart.room(), 16u);
    CHECK_EQ(f.feed("0123456789abcdefgh"), 16u);
    CHECK_EQ(f.feed("g"), 0u);
    for (int i = 0; i < 7; ++i) in(f.uart, kData);
    CHECK_EQ(room, 1);
    in(f.uart, kData);  // half empty
    CHECK_EQ(room, 2);
    in(f.uart, kData);
    CHECK_EQ(room, 2);  // told once
    CHECK_EQ(in(f.uart, kLsr) & 2, 0);
    CHECK_EQ(f.feed("x"), 1u);
    f.feed(std::string(20, 'y'));
    out(f.uart, kFcr, u8{3});  // the guest throws its FIFO away
    CHECK_EQ(room, 3);
    CHECK_EQ(in(f.uart, kLsr), 0x60);
}

void loopback() {
    Fixture f;
    out(f.uart, kFcr, u8{1});
    in(f.uart, kMsr);
    out(f.uart, kMcr, u8{0x10});
    CHECK_EQ(in(f.uart, kMsr) & 0xf0, 0);
    CHECK_EQ(f.feed("outside"), 0u);
    struct Row {
        u8 mcr, msr;
    };
    for (Row row : {Row{0x11, 0x20}, Row{0x12, 0x10}, Row{0x14, 0x40}, Row{0x18, 0x80}}) {
        out(f.uart, kMcr, row.mcr);
        u8 msr = in(f.uart, kMsr);
        CHECK_EQ(msr & 0xf0, row.msr);
    }
    out(f.uart, kMcr, u8{0x10});
    in(f.uart, kMsr);
    out(f.uart, kMcr, u8{0x13});
    CHECK_EQ(in(f.uart, kMsr), 0x33);  // CTS and DSR with their deltas
    CHECK_EQ(in(f.uart, kMsr), 0x30);
    out(f.uart, kMcr, u8{0x14});
    CHECK_EQ(in(f.uart, kMsr) & 0x44, 0x40);  // RI counts when it ends
    out(f.uart, kMcr, u8{0x10});
    CHECK_EQ(in(f.uart, kMsr) & 0x44, 0x04);
    out(f.uart, kIer, u8{8});
    out(f.uart, kMcr, u8{0x11});
    CHECK_EQ(in(f.uart, kIir), 0xc0);  // modem status
    CHECK(!f.line.level);              // the pin is disconnected
    in(f.uart, kMsr);
    CHECK_EQ(in(f.uart, kIir), 0xc1);
    for (char c : std::string("loop")) out(f.uart, kData, static_cast<u8>(c));
    CHECK_EQ(in(f.uart, kLsr), 0x61);
    CHECK_EQ(in(f.uart, kData), 'l');
    for (int i = 0; i < 14; ++i) out(f.uart, kData, u8{'z'});
    CHECK_EQ(in(f.uart, kLsr) & 2, 2);  // overrun, read once
    CHECK_EQ(in(f.uart, kLsr) & 2, 0);
    CHECK(f.sink.text.empty());
}

void line_status() {
    Fixture f;
    out(f.uart, kFcr, u8{1});
    out(f.uart, kIer, u8{7});
    in(f.uart, kIir);
    f.uart.receive_break();
    CHECK_EQ(in(f.uart, kIir), 0xc6);  // before received data
    CHECK_EQ(in(f.uart, kLsr), 0xf1);
    CHECK_EQ(in(f.uart, kIir), 0xc4);
    CHECK_EQ(in(f.uart, kData), 0);
    CHECK_EQ(in(f.uart, kIir), 0xc1);
}

void snapshot() {
    Fixture f;
    out(f.uart, kFcr, u8{0x81});
    out(f.uart, kIer, u8{3});
    f.feed("wait");
    f.sink.is_ready = false;
    out(f.uart, kData, u8{'h'});
    out(f.uart, kData, u8{'\n'});
    auto saved = f.uart.save();
    Fixture g;
    g.sink.is_ready = false;
    g.uart.restore(saved);
    CHECK(g.uart.save() == saved);
    CHECK(g.line.level);
    CHECK_EQ(in(g.uart, kData), 'w');
    Fixture h;
    h.uart.restore(saved);
    CHECK_EQ(h.sink.text, "h\n");  // this sink is ready: what was held goes out
    auto state = f.uart.state();
    state.rx_count = 17;
    CHECK_THROWS(h.uart.restore({reinterpret_cast<const u8*>(&state), sizeof state}), StateError);
    CHECK_THROWS(h.uart.restore({saved.data(), 3}), StateError);
}

void without_sink() {
    Clock clock(Clock::Mode::kDeterministic);
    Line line;
    Serial uart(clock, line, nullptr);
    out(uart, kData, u8{'x'});
    CHECK_EQ(in(uart, kLsr), 0x60);
    uart.flush();
}

}  // namespace

int main() {
    reset_values();
    divisor_latch();
    linux_autoconfig();
    transmit_batches();
    transmit_interrupt();
    back_pressure();
    receive_trigger_levels();
    receive_timeout();
    receive_without_overrun();
    loopback();
    line_status();
    snapshot();
    without_sink();
    return pvtest::finish("test_serial");
}
