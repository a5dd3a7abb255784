#include "soft/engine.hpp"

#include "soft/dirty_log.hpp"
#include "soft/vcpu.hpp"

namespace polyvisor::soft {

namespace {

class SoftEngine final : public Engine {
  public:
    explicit SoftEngine(const EngineConfig& config)
        : config_(config), pages_(config.memory), dirty_log_(config.memory) {
        config_.memory.set_write_observer(
            [this](Gpa gpa, u64 size) { pages_.stored(nullptr, gpa.value, size); });
    }
    ~SoftEngine() override { config_.memory.set_write_observer({}); }

    Caps caps() const override { return {.instruction_budget = true, .deterministic = true}; }
    const char* name() const override { return "soft"; }
    std::unique_ptr<Vcpu> create_vcpu(u32 id, LocalInterrupts* lapic) override {
        return std::make_unique<SoftVcpu>(config_, pages_, dirty_log_, id, lapic);
    }
    DirtyLog& dirty_log() override { return dirty_log_; }

  private:
    EngineConfig config_;
    CodePages pages_;
    SoftDirtyLog dirty_log_;
};

}  // namespace

std::unique_ptr<Engine> create_engine(const EngineConfig& config) {
    return std::make_unique<SoftEngine>(config);
}

}  // namespace polyvisor::soft
