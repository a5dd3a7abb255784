// One vCPU on KVM: requests from other threads, the KVM_RUN loop, and in mode kUser the injection
// of our local APIC's interrupts. Exits are served in exits.cpp, state is moved in cpu_state.cpp.
#pragma once

#include "kvm/abi.hpp"

#include <array>
#include <condition_variable>
#include <mutex>
#include <optional>

#include "base/fd.hpp"
#include "base/mapping.hpp"
#include "cpu/engine.hpp"
#include "kvm/debug.hpp"
#include "kvm/stats.hpp"
#include "kvm/vm.hpp"

namespace polyvisor::kvm {

class KvmVcpu final : public Vcpu {
  public:
    KvmVcpu(Vm& vm, u32 id, LocalInterrupts* lapic);
    ~KvmVcpu() override;

    Exit run() override;
    void request_stop() override { request(kStop); }
    void set_instruction_budget(u64 instructions) override;
    void set_debug(const GuestDebug& debug) override;
    void raise_int3() override { debug_.raise_int3(); }
    CpuState save() const override;
    void restore(const CpuState& state) override;
    GeneralRegisters general() const override;
    void set_general(const GeneralRegisters& registers) override;
    FpuState fpu() const override;
    void set_fpu(const FpuState& fpu) override;
    u32 id() const override { return id_; }
    bool translate(u64 gva, u64& gpa) const override;
    std::vector<Counter> counters() const override { return {}; }
    std::vector<Counter> exits() const override;
    std::vector<Statistic> host_statistics() const override { return stats_.read(); }

    void interrupt() override { request(kInterrupt); }
    void nmi() override { request(kNmi); }
    void smi() override {}
    void init() override { request(kInit); }
    void sipi(u8 vector) override;

    // What the files of this folder share.
    Vm& vm() const { return vm_; }
    int fd() const { return fd_.get(); }
    kvm_run& shared() const { return *run_; }
    LocalInterrupts* lapic() const { return lapic_; }
    VcpuDebug& debug() { return debug_; }
    /// The vCPU's CPUID, as KVM has it.
    const std::vector<kvm_cpuid_entry2>& cpuid() const { return cpuid_; }
    /// True when no local APIC of KVM's delivers interrupts.
    bool user_lapic() const { return vm_.irqchip() == IrqchipMode::kUser; }
    /// As KVM made it: restore() has not been called yet.
    bool fresh() const { return fresh_; }
    /// Guest TSC minus the machine clock's, as CpuState.msr.tsc_offset.
    u64 tsc_offset() const;
    /// Bytes of KVM's XSAVE area for it.
    std::size_t xsave_size() const;

  private:
    enum Request : u32 { kStop = 1, kInterrupt = 2, kNmi = 4, kInit = 8, kSipi = 16 };
    /// What to do after an exit was served.
    enum class Then : u8 {
        kEnter,  ///< run on
        kReturn  ///< run() returns the Exit
    };

    void request(u32 bits);
    bool take_requests(Exit& exit);
    bool wait_while_halted(Exit& exit);
    void inject();
    void enter_init();
    void enter_sipi(u8 vector);
    void complete();
    void flush_registers() const;
    void check_standing() const;
    Then end_step(Then then, Exit& exit);

    // exits.cpp
    Then handle(Exit& exit);
    Then handle_io(Exit& exit);
    Then handle_mmio(Exit& exit);
    void handle_msr(bool write);
    Then fail(Exit& exit, std::string what) const;
    std::string describe() const;

    void sync_tsc(bool anew);
    s64 kernel_tsc_offset() const;

    Vm& vm_;
    const u32 id_;
    LocalInterrupts* const lapic_;
    OwnedFd fd_;
    StatsFile stats_;
    Mapping mapping_;
    kvm_run* run_ = nullptr;
    std::vector<kvm_cpuid_entry2> cpuid_;

    std::atomic<u32> requests_{0};
    std::atomic<int> thread_{0};  // whose KVM_RUN a request interrupts; 0: none
    std::atomic<u8> sipi_vector_{0};
    std::mutex halt_mutex_;  // a leaf
    std::condition_variable halt_wake_;
    Activity activity_ = Activity::kRunning;  // kUser only: KVM does not know of halting then
    bool halt_reported_ = false;
    bool fresh_ = true;
    mutable std::size_t xsave_size_ = 0;  // 0: KVM has not been asked
    bool registers_here_ = false;         // kvm_run has the registers as they are
    bool incomplete_ = false;             // KVM has to finish an instruction whose access we served
    u8 cr8_ = 0;                          // as our local APIC last heard
    bool interrupt_waiting_ = false;
    VcpuDebug debug_{*this};
    std::optional<Exit> held_exit_;  // a step that ended while an access was completed
    u64 clock_generation_ = 0;
    bool tsc_attribute_ = false;  // KVM_VCPU_TSC_OFFSET: kernels since 5.16
    u64 tsc_offset_ = 0;          // CpuState.msr.tsc_offset, less what the guest added since
    s64 kernel_offset_ = 0;       // what KVM was given for it
    std::array<std::atomic<u64>, 64> exits_{};  // by KVM's exit reason; written by one thread
};

}  // namespace polyvisor::kvm
