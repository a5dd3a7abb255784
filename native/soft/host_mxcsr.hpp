// While guest code runs, the host's MXCSR is the guest's: its rounding, its flushing of denormals,
// and the sticky flags it collects. Whatever else runs on the thread meanwhile (devices, which may
// be Python; containers that compute load factors) gets the host's usual one for that time.
#pragma once

#include "base/types.hpp"

namespace polyvisor::soft {

class HostMxcsr {
  public:
    HostMxcsr() {
        u32 usual = 0x1f80;
        asm volatile("stmxcsr %0\n\tldmxcsr %1" : "=m"(guest_) : "m"(usual) : "memory");
    }
    ~HostMxcsr() { asm volatile("ldmxcsr %0" ::"m"(guest_) : "memory"); }
    HostMxcsr(const HostMxcsr&) = delete;

  private:
    u32 guest_;
};

}  // namespace polyvisor::soft
