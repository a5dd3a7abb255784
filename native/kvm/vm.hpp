// One KVM VM: its descriptor and what belongs to it rather than to a vCPU.
#pragma once

#include <memory>
#include <vector>

#include "base/log.hpp"
#include "bus/bus.hpp"
#include "cpu/engine.hpp"
#include "kvm/guest_clock.hpp"
#include "kvm/memslots.hpp"
#include "kvm/system.hpp"

namespace polyvisor::kvm {

class Chips;
class BusHooks;
class KvmVcpu;
class KvmDirtyLog;

class Vm {
  public:
    Vm(std::shared_ptr<const System> system, const EngineConfig& config);
    ~Vm();
    Vm(const Vm&) = delete;
    Vm& operator=(const Vm&) = delete;

    int fd() const { return fd_.get(); }
    const System& system() const { return *system_; }
    int check(int capability) const;
    const EngineConfig& config() const { return config_; }
    IrqchipMode irqchip() const { return config_.irqchip; }
    /// A program and nothing else: EngineConfig::port_exits.
    bool bare() const { return config_.port_exits; }

    Memslots& memslots() { return *memslots_; }
    GuestClock& clock() { return *clock_; }
    /// nullptr in mode kUser.
    Chips* chips() { return chips_.get(); }
    BusHooks& bus_hooks() { return *hooks_; }
    const BusHooks& bus_hooks() const { return *hooks_; }
    KvmDirtyLog& dirty_log() { return *dirty_log_; }
    /// In order of their ids; nullptr for one that does not exist (yet, any more).
    KvmVcpu* vcpu(u32 id) const { return id < vcpus_.size() ? vcpus_[id] : nullptr; }
    /// KVM_CREATE_VCPU. Throws ConfigError beyond config().cpus, StateMismatch for one that was
    /// made before, HostError.
    OwnedFd create_vcpu(u32 id) const;
    void register_vcpu(u32 id, KvmVcpu* vcpu);

    /// The kernel binds a VM to the process that made it. Throws StateMismatch in a forked child.
    void check_process() const;

  private:
    std::shared_ptr<const System> system_;
    EngineConfig config_;
    int pid_;
    OwnedFd fd_;
    std::vector<KvmVcpu*> vcpus_;
    std::unique_ptr<Memslots> memslots_;
    std::unique_ptr<GuestClock> clock_;
    std::unique_ptr<Chips> chips_;
    std::unique_ptr<KvmDirtyLog> dirty_log_;
    std::unique_ptr<BusHooks> hooks_;
};

}  // namespace polyvisor::kvm
