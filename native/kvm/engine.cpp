#include "kvm/engine.hpp"

#include "kvm/bus_hooks.hpp"
#include "kvm/chips.hpp"
#include "kvm/dirty_log.hpp"
#include "kvm/stats.hpp"
#include "kvm/vcpu.hpp"

namespace polyvisor::kvm {

namespace {

class KvmEngine final : public Engine {
  public:
    KvmEngine(std::shared_ptr<const System> system, const EngineConfig& config)
        : vm_(std::move(system), config),
          stats_(vm_.bare() ? StatsFile(OwnedFd()) : StatsFile(vm_.fd())) {}

    Caps caps() const override {
        return {.nested_paging = true,
                .tsc_scaling = vm_.check(KVM_CAP_TSC_CONTROL) != 0,
                .max_cpus = static_cast<u32>(vm_.check(KVM_CAP_MAX_VCPUS))};
    }
    const char* name() const override { return "kvm"; }
    InterruptChips* chips() override { return vm_.chips(); }
    void sync_memory() override { vm_.memslots().sync(); }
    void forget_tables() override {
        if (!vm_.system().nested_paging()) vm_.memslots().forget_tables();
    }
    DirtyLog& dirty_log() override { return vm_.dirty_log(); }
    std::vector<Vcpu::Counter> counters() const override {
        BusHooks::Counts hooks = vm_.bus_hooks().counts();
        return {{"doorbells", hooks.doorbells},
                {"posted_ranges", hooks.posted_ranges},
                {"posted_writes", hooks.delivered},
                {"refused_ranges", hooks.refused}};
    }
    std::vector<Statistic> host_statistics() const override { return stats_.read(); }
    std::unique_ptr<Vcpu> create_vcpu(u32 id, LocalInterrupts* lapic) override {
        return std::make_unique<KvmVcpu>(vm_, id, lapic);
    }

  private:
    Vm vm_;
    StatsFile stats_;
};

}  // namespace

std::unique_ptr<Engine> create_engine(std::shared_ptr<const System> system,
                                      const EngineConfig& config) {
    return std::make_unique<KvmEngine>(std::move(system), config);
}

}  // namespace polyvisor::kvm
