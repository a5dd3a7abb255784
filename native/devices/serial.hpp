// A 16550A UART: FIFOs of 16 bytes, trigger levels, loopback, modem lines.
//
// The baud rate is not emulated: a transmitted byte is gone at once, and a received one arrives
// when there is room for it. Output goes through an OutputBatch; when the sink is not ready, the
// transmitter stays busy (THRE clear), so a slow reader slows the guest and nothing is lost. Input
// is offered with receive(), which takes only what fits; the room callback says when more would.
//
// Offsets 0..7 are the registers, byte wide.
#pragma once

#include <array>
#include <functional>
#include <mutex>

#include "bus/device.hpp"
#include "devices/char_sink.hpp"

namespace polyvisor::devices {

class Serial final : public Device, public CharPort {
  public:
    static constexpr unsigned kFifoSize = 16;

    struct State {
        u16 divisor = 1;
        u8 ier = 0;
        u8 fcr = 0;  ///< enable and trigger bits
        u8 lcr = 0;
        u8 mcr = 0;
        u8 lsr_errors = 0;   ///< OE, PE, FE, BI not yet read
        u8 msr_delta = 0;    ///< low nibble of MSR
        u8 modem_lines = 0;  ///< high nibble of MSR as the outside drives it
        u8 scratch = 0;
        u8 thr_interrupt = 0;  ///< 1: THR became empty, and neither IIR was read nor THR written
        u8 timeout = 0;        ///< 1: receive data waits below the trigger level
        u8 tx_count = 0;       ///< bytes held back because the sink is not ready
        u8 rx_count = 0;
        u8 tx[kFifoSize] = {};
        u8 rx[kFifoSize] = {};
    };

    /// `sink` may be nullptr (output vanishes) and outlives the device.
    Serial(Clock& clock, IrqLine& irq, CharSink* sink);
    ~Serial() override;

    std::string_view name() const override { return "serial"; }
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;
    void reset() override;
    std::vector<u8> save() const override;
    void restore(std::span<const u8> state) override;
    State state() const;

    /// Offers bytes from the outside; returns how many were taken (0..room()).
    std::size_t receive(std::span<const u8> bytes) override;
    std::size_t room() const;
    void set_room_callback(std::function<void()> callback) override;
    /// A break condition on the line.
    void receive_break();
    /// Passes collected output to the sink now (pause, end of the machine).
    void flush() { batch_.flush(); }

  private:
    u8 read_register(unsigned offset);
    void write_register(unsigned offset, u8 value);
    void write_fcr(u8 value);
    void write_mcr(u8 value);
    void transmit(u8 value);
    void sink_ready();
    void rx_idle();
    void push_rx(u8 value);
    u8 pop_rx();
    bool fifo() const { return state_.fcr & 1; }
    bool loopback() const { return state_.mcr & 0x10; }
    unsigned capacity() const { return fifo() ? kFifoSize : 1; }
    unsigned trigger() const;
    u8 lsr() const;
    u8 msr_lines() const;
    void modem_changed(u8 before);
    u8 interrupt_id() const;
    void update_irq();

    Clock& clock_;
    IrqLine& irq_;
    mutable std::mutex mutex_;  // before IrqRouter's and OutputBatch's
    State state_;
    bool irq_level_ = false;
    bool refused_ = false;  // receive() took less than offered
    bool idle_armed_ = false;
    std::function<void()> room_;
    OutputBatch batch_;
    Timer idle_timer_;  // re-raises the receive timeout while data is left unread
};

}  // namespace polyvisor::devices
