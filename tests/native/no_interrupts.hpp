// A local APIC that never has anything for its CPU.
#pragma once

#include "bus/interrupts.hpp"

namespace pvtest {

class NoInterrupts final : public polyvisor::LocalInterrupts {
  public:
    bool pending() const override { return false; }
    int acknowledge() override { return -1; }
    polyvisor::u8 cr8() const override { return 0; }
    void set_cr8(polyvisor::u8) override {}
    bool read_msr(polyvisor::u32, polyvisor::u64&) override { return false; }
    bool write_msr(polyvisor::u32, polyvisor::u64) override { return false; }
    polyvisor::u64 mmio_base() const override { return ~polyvisor::u64{0}; }
    void mmio_read(polyvisor::u32, std::span<polyvisor::u8>) override {}
    void mmio_write(polyvisor::u32, std::span<const polyvisor::u8>) override {}
    void reset(bool) override {}
};

}  // namespace pvtest
