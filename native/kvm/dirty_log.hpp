// DirtyLog over KVM's per-slot bitmaps (KVM_GET_DIRTY_LOG, cleared by KVM_CLEAR_DIRTY_LOG where the
// kernel can) or its per-vCPU rings (KVM_CAP_DIRTY_LOG_RING), with the host's own writes added.
#pragma once

#include "memory/dirty_log.hpp"

namespace polyvisor::kvm {

class Vm;

class KvmDirtyLog final : public DirtyLog {
  public:
    explicit KvmDirtyLog(Vm& vm) : vm_(vm) {}
    const char* method() const override;
    bool active() const override;
    void start() override;
    void stop() override;
    void fetch(const GuestMemory::Region& region, std::span<u64> bitmap) override;

    /// KVM_EXIT_DIRTY_RING_FULL, and before a vCPU ends.
    void collect(u32 vcpu);

  private:
    Vm& vm_;
};

}  // namespace polyvisor::kvm
