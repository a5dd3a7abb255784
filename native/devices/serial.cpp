// Interrupt sources are kept as the data sheet's: line status, received data or its timeout,
// transmitter empty, modem status, in that priority. The output pin is their OR, gated by OUT2 as
// on a PC.
#include "devices/serial.hpp"

#include <algorithm>
#include <cstring>

#include "bus/pod_state.hpp"

namespace polyvisor::devices {

namespace {

enum : unsigned { kData, kIer, kIirFcr, kLcr, kMcr, kLsr, kMsr, kScratch };

constexpr u8 kIerRx = 1, kIerThr = 2, kIerLine = 4, kIerModem = 8;
constexpr u8 kIirNone = 1, kIirModem = 0, kIirThr = 2, kIirRx = 4, kIirLine = 6, kIirTimeout = 0xc,
             kIirFifo = 0xc0;
constexpr u8 kLcrDlab = 0x80;
constexpr u8 kMcrDtr = 1, kMcrRts = 2, kMcrOut1 = 4, kMcrOut2 = 8, kMcrMask = 0x1f;
constexpr u8 kLsrData = 1, kLsrOverrun = 2, kLsrBreak = 0x10, kLsrErrors = 0x1e, kLsrEmpty = 0x60,
             kLsrFifoError = 0x80;
constexpr u8 kMsrCts = 0x10, kMsrDsr = 0x20, kMsrRi = 0x40, kMsrDcd = 0x80;
constexpr u8 kConnected = kMsrCts | kMsrDsr | kMsrDcd;  // a terminal that is there and listens

// Four character times at 115200 baud, the 16550's receive timeout.
constexpr Nanoseconds kTimeout = 350'000;

}  // namespace

Serial::Serial(Clock& clock, IrqLine& irq, CharSink* sink)
    : clock_(clock), irq_(irq), batch_(clock, sink), idle_timer_(clock, [this] { rx_idle(); }) {
    state_.modem_lines = kConnected;
    state_.divisor = 12;  // 9600 baud, as firmware leaves it
    if (sink != nullptr) sink->set_ready_callback([this] { sink_ready(); });
}

Serial::~Serial() {
    if (batch_.sink() == nullptr) return;
    batch_.sink()->set_ready_callback({});
    batch_.flush();
}

void Serial::reset() {
    std::lock_guard lock(mutex_);
    u8 lines = state_.modem_lines;
    state_ = State{};
    state_.modem_lines = lines;
    state_.divisor = 12;
    update_irq();
}

std::vector<u8> Serial::save() const {
    return save_pod(state());
}

Serial::State Serial::state() const {
    std::lock_guard lock(mutex_);
    return state_;
}

void Serial::restore(std::span<const u8> bytes) {
    State state = load_pod<State>(bytes, name());
    check_state(state.tx_count <= kFifoSize, name(), "tx_count");
    check_state(state.rx_count <= ((state.fcr & 1) ? kFifoSize : 1), name(), "rx_count");
    check_state((state.fcr & ~0xc9) == 0, name(), "fcr");
    check_state((state.mcr & ~kMcrMask) == 0, name(), "mcr");
    check_state((state.ier & ~0x0f) == 0, name(), "ier");
    check_state((state.lsr_errors & ~kLsrErrors) == 0, name(), "lsr_errors");
    {
        std::lock_guard lock(mutex_);
        state_ = state;
        update_irq();
    }
    sink_ready();  // this sink may be ready where the saved one was not
}

unsigned Serial::trigger() const {
    constexpr u8 kLevels[] = {1, 4, 8, 14};
    return fifo() ? kLevels[state_.fcr >> 6] : 1;
}

u8 Serial::lsr() const {
    u8 value = state_.lsr_errors;
    if (state_.rx_count > 0) value |= kLsrData;
    if (state_.tx_count == 0) value |= kLsrEmpty;
    if (fifo() && (state_.lsr_errors & (kLsrErrors & ~kLsrOverrun))) value |= kLsrFifoError;
    return value;
}

// In loopback the modem outputs are wired to the inputs.
u8 Serial::msr_lines() const {
    if (!loopback()) return state_.modem_lines;
    u8 mcr = state_.mcr;
    return static_cast<u8>((mcr & kMcrRts ? kMsrCts : 0) | (mcr & kMcrDtr ? kMsrDsr : 0) |
                           (mcr & kMcrOut1 ? kMsrRi : 0) | (mcr & kMcrOut2 ? kMsrDcd : 0));
}

// Notes which inputs changed; the ring indicator only when it ends.
void Serial::modem_changed(u8 before) {
    u8 now = msr_lines();
    u8 changed = static_cast<u8>(before ^ now) & static_cast<u8>(~kMsrRi);
    if ((before & kMsrRi) && !(now & kMsrRi)) changed |= kMsrRi;
    state_.msr_delta |= static_cast<u8>(changed >> 4);
}

u8 Serial::interrupt_id() const {
    if ((state_.ier & kIerLine) && state_.lsr_errors != 0) return kIirLine;
    if (state_.ier & kIerRx) {
        if (state_.rx_count >= trigger()) return kIirRx;
        if (state_.timeout && state_.rx_count > 0) return kIirTimeout;
    }
    if ((state_.ier & kIerThr) && state_.thr_interrupt) return kIirThr;
    if ((state_.ier & kIerModem) && state_.msr_delta != 0) return kIirModem;
    return kIirNone;
}

void Serial::update_irq() {
    bool wired = (state_.mcr & kMcrOut2) && !loopback();
    bool level = wired && interrupt_id() != kIirNone;
    if (level == irq_level_) return;
    irq_level_ = level;
    irq_.set(level);
}

void Serial::push_rx(u8 value) {
    if (state_.rx_count >= capacity()) {
        state_.lsr_errors |= kLsrOverrun;  // the FIFO keeps what it has, a lone buffer the newest
        if (!fifo()) state_.rx[0] = value;
        return;
    }
    state_.rx[state_.rx_count++] = value;
}

u8 Serial::pop_rx() {
    if (state_.rx_count == 0) return 0;
    u8 value = state_.rx[0];
    --state_.rx_count;
    std::memmove(state_.rx, state_.rx + 1, state_.rx_count);
    // The timeout starts anew with each read; if the guest leaves the rest, it comes again.
    state_.timeout = 0;
    if (fifo() && state_.rx_count > 0 && !idle_armed_) {
        idle_armed_ = true;
        idle_timer_.arm(clock_.now() + kTimeout);
    }
    return value;
}

void Serial::rx_idle() {
    std::lock_guard lock(mutex_);
    idle_armed_ = false;
    if (!fifo() || state_.rx_count == 0) return;
    state_.timeout = 1;
    update_irq();
}

void Serial::transmit(u8 value) {
    if (loopback()) {
        push_rx(value);
        state_.timeout = fifo();
    } else {
        CharSink* sink = batch_.sink();
        if (state_.tx_count == 0 && (sink == nullptr || sink->ready())) {
            batch_.put(value);
        } else if (state_.tx_count < kFifoSize) {
            state_.tx[state_.tx_count++] = value;
        }  // else the guest did not wait for THRE: lost, as in the chip
    }
    state_.thr_interrupt = 0;
    if (state_.tx_count > 0) return;
    // In FIFO mode a burst leaves the line up; without FIFOs each byte is an edge of its own.
    if (!fifo()) update_irq();
    state_.thr_interrupt = 1;
}

void Serial::sink_ready() {
    std::lock_guard lock(mutex_);
    if (state_.tx_count == 0) return;
    CharSink* sink = batch_.sink();
    if (sink != nullptr && !sink->ready()) return;
    for (unsigned i = 0; i < state_.tx_count; ++i) batch_.put(state_.tx[i]);
    state_.tx_count = 0;
    state_.thr_interrupt = 1;
    update_irq();
}

void Serial::write_fcr(u8 value) {
    bool enable = value & 1;
    bool toggled = enable != fifo();
    if (toggled || (enable && (value & 2))) {
        state_.rx_count = 0;
        state_.timeout = 0;
    }
    if ((toggled || (enable && (value & 4))) && state_.tx_count > 0) {
        state_.tx_count = 0;
        state_.thr_interrupt = 1;
    }
    state_.fcr = enable ? value & 0xc9 : 0;
}

void Serial::write_mcr(u8 value) {
    u8 before = msr_lines();
    state_.mcr = value & kMcrMask;
    modem_changed(before);
}

u8 Serial::read_register(unsigned offset) {
    bool dlab = state_.lcr & kLcrDlab;
    u8 value;
    switch (offset) {
        case kData:
            return dlab ? static_cast<u8>(state_.divisor) : pop_rx();
        case kIer:
            return dlab ? static_cast<u8>(state_.divisor >> 8) : state_.ier;
        case kIirFcr:
            value = interrupt_id();
            if (value == kIirThr) state_.thr_interrupt = 0;
            return value | (fifo() ? kIirFifo : 0);
        case kLcr:
            return state_.lcr;
        case kMcr:
            return state_.mcr;
        case kLsr:
            value = lsr();
            state_.lsr_errors = 0;
            return value;
        case kMsr:
            value = msr_lines() | state_.msr_delta;
            state_.msr_delta = 0;
            return value;
        case kScratch:
            return state_.scratch;
        default:
            return 0xff;
    }
}

void Serial::write_register(unsigned offset, u8 value) {
    bool dlab = state_.lcr & kLcrDlab;
    switch (offset) {
        case kData:
            if (dlab) {
                state_.divisor = static_cast<u16>((state_.divisor & 0xff00) | value);
            } else {
                transmit(value);
            }
            break;
        case kIer:
            if (dlab) {
                state_.divisor = static_cast<u16>((state_.divisor & 0xff) | value << 8);
                break;
            }
            // Enabling the THR interrupt while THR is empty raises it.
            if ((value & ~state_.ier & kIerThr) && state_.tx_count == 0) state_.thr_interrupt = 1;
            state_.ier = value & 0x0f;
            break;
        case kIirFcr:
            write_fcr(value);
            break;
        case kLcr:
            state_.lcr = value;
            break;
        case kMcr:
            write_mcr(value);
            break;
        case kScratch:
            state_.scratch = value;
            break;
        default:  // LSR and MSR are read-only
            break;
    }
}

void Serial::read(u64 offset, std::span<u8> data) {
    std::function<void()> room;
    {
        std::lock_guard lock(mutex_);
        for (u8& byte : data) byte = read_register(static_cast<unsigned>(offset++ & 0xff));
        update_irq();
        if (refused_ && state_.rx_count <= capacity() / 2) {
            refused_ = false;
            room = room_;
        }
    }
    if (room) room();
}

void Serial::write(u64 offset, std::span<const u8> data) {
    std::function<void()> room;
    {
        std::lock_guard lock(mutex_);
        for (u8 byte : data) write_register(static_cast<unsigned>(offset++ & 0xff), byte);
        update_irq();
        if (refused_ && state_.rx_count <= capacity() / 2 &&
            !loopback()) {  // FIFO cleared or enabled
            refused_ = false;
            room = room_;
        }
    }
    if (room) room();
}

std::size_t Serial::receive(std::span<const u8> bytes) {
    std::lock_guard lock(mutex_);
    // In loopback the input pin is disconnected; bytes wait outside until it ends.
    std::size_t space =
        loopback() ? 0 : capacity() - std::min<std::size_t>(state_.rx_count, capacity());
    std::size_t taken = std::min(space, bytes.size());
    for (std::size_t i = 0; i < taken; ++i) push_rx(bytes[i]);
    if (taken < bytes.size()) refused_ = true;
    if (taken > 0) {
        // Nothing more is on its way at any baud rate, so the timeout is due at once.
        state_.timeout = fifo();
        update_irq();
    }
    return taken;
}

std::size_t Serial::room() const {
    std::lock_guard lock(mutex_);
    return loopback() ? 0 : capacity() - std::min<std::size_t>(state_.rx_count, capacity());
}

void Serial::set_room_callback(std::function<void()> callback) {
    std::lock_guard lock(mutex_);
    room_ = std::move(callback);
}

void Serial::receive_break() {
    std::lock_guard lock(mutex_);
    state_.lsr_errors |= kLsrBreak;
    push_rx(0);
    state_.timeout = fifo();
    update_irq();
}

}  // namespace polyvisor::devices
