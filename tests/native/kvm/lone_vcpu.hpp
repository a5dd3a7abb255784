// What tests of one vCPU need: a local APIC that never has anything for it, and whether this host's
// KVM is a whole one.
#pragma once

#include <unistd.h>

#include "bus/interrupts.hpp"

namespace pvtest {

using namespace polyvisor;

class NoInterrupts final : public LocalInterrupts {
  public:
    bool pending() const override { return false; }
    int acknowledge() override { return -1; }
    u8 cr8() const override { return 0; }
    void set_cr8(u8) override {}
    bool read_msr(u32, u64&) override { return false; }
    bool write_msr(u32, u64) override { return false; }
    u64 mmio_base() const override { return 0xfee00000; }
    void mmio_read(u32, std::span<u8>) override {}
    void mmio_write(u32, std::span<const u8>) override {}
    void reset(bool) override {}
};

/// False for KVMs that do without the CPU's virtualization (PVM): they have not all modes, and
/// emulate ring 0 as far as Linux needs it.
inline bool hardware() {
    return ::access("/sys/module/kvm_amd", F_OK) == 0 ||
           ::access("/sys/module/kvm_intel", F_OK) == 0;
}

}  // namespace pvtest
