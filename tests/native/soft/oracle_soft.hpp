// Runs Cases on the soft engine: a long-mode guest with the oracle's pages mapped for user mode,
// one instruction at a time. Exceptions are taken through a real IDT, so their delivery is tested
// as well.
#pragma once

#include <memory>

#include "bus/bus.hpp"
#include "bus/clock.hpp"
#include "cpu/cpuid.hpp"
#include "memory/guest_memory.hpp"
#include "oracle_case.hpp"

namespace polyvisor {
class Engine;
class Vcpu;
}  // namespace polyvisor

namespace pvtest {

class SoftCpu {
  public:
    /// generic: every instruction by its Operation, no specialised handlers.
    explicit SoftCpu(bool generic);
    ~SoftCpu();

    Outcome run(const Case& c);
    const polyvisor::FeatureSet& features() const { return cpuid_.features; }

  private:
    void make_system();

    polyvisor::GuestMemory memory_;
    polyvisor::Bus pio_;
    polyvisor::Bus mmio_;
    polyvisor::Clock clock_;
    polyvisor::CpuidPolicy cpuid_;
    std::unique_ptr<polyvisor::Engine> engine_;
    std::unique_ptr<polyvisor::Vcpu> vcpu_;
};

}  // namespace pvtest
