// An engine without a CPU: what a program "executes" is a C++ function that is asked for the next
// system call. It sees the program's memory through the page tables, as a CPU would, and takes page
// faults; everything else of a process VM is the real thing.
#pragma once

#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/engine.hpp"
#include "mmu/format.hpp"
#include "process/supervisor.hpp"

namespace pvtest {

using namespace polyvisor;

class FakeVcpu;

/// What a program does: sets the registers of the next system call. One for each vCPU, called on
/// its thread; `rax` of before is the result of the last one.
struct FakeProgram {
    virtual ~FakeProgram() = default;
    virtual void next(FakeVcpu& cpu) = 0;
};
using MakeProgram = std::function<std::unique_ptr<FakeProgram>(u32 cpu)>;

class FakeVcpu final : public Vcpu {
  public:
    FakeVcpu(const EngineConfig& config, u32 id, bool hypercalls,
             std::unique_ptr<FakeProgram> program)
        : memory_(config.memory), id_(id), hypercalls_(hypercalls), program_(std::move(program)) {}

    GeneralRegisters registers;

    /// The program's own access to its memory, of at most a page's rest: bytes done. At 0 of them,
    /// fault() makes run() tell the monitor of it.
    std::size_t access(u64 gva, void* bytes, std::size_t size, bool write) {
        size = std::min<std::size_t>(size, kPageSize - (gva & kPageMask));
        u8* at = translate_to_host(gva, write, true);
        if (at == nullptr) return 0;
        // (The kernel does it, which survives pages of files that are gone.)
        iovec mine{bytes, size}, its{at, size};
        const ssize_t done = write ? ::process_vm_writev(::getpid(), &mine, 1, &its, 1, 0)
                                   : ::process_vm_readv(::getpid(), &mine, 1, &its, 1, 0);
        return done > 0 ? static_cast<std::size_t>(done) : 0;
    }
    void fault(u64 gva, bool write) { fault_ = {gva, write}; }

    Exit run() override {
        take_frame();
        if (stop_.exchange(false)) return {};
        fault_.reset();
        program_->next(*this);
        Exit exit;
        exit.write = true;
        exit.size = 1;
        if (fault_) return page_fault(exit);
        // SYSCALL
        registers.gpr[kRcx] = kText;
        registers.gpr[11] = 0x202;
        return leave(exit, process::Supervisor::kEntry, 0x80);
    }

    void request_stop() override { stop_ = true; }
    void set_instruction_budget(u64) override {}
    void set_debug(const GuestDebug&) override {}
    void raise_int3() override {}
    CpuState save() const override {
        CpuState state = state_;
        state.gpr = registers.gpr;
        state.rip = registers.rip;
        state.rflags = registers.rflags;
        return state;
    }
    void restore(const CpuState& state) override {
        state_ = state;
        registers = {state.gpr, state.rip, state.rflags};
    }
    GeneralRegisters general() const override { return registers; }
    void set_general(const GeneralRegisters& wanted) override { registers = wanted; }
    u32 id() const override { return id_; }
    bool translate(u64, u64&) const override { return false; }
    std::vector<Counter> counters() const override { return {}; }
    void interrupt() override {}
    void nmi() override {}
    void smi() override {}
    void init() override {}
    void sipi(u8) override {}

  private:
    static constexpr u64 kText = 0x400000;
    // As the gates have it.
    struct Frame {
        u64 error, rip, cs, rflags, rsp, ss;
    };
    struct Fault {
        u64 gva;
        bool write;
    };

    u8* translate_to_host(u64 gva, bool write, bool user) const {
        u64 table = state_.cr3;
        for (unsigned shift = 39;; shift -= 9) {
            const u64 at = (table & kPteAddress) + (gva >> shift & 511) * 8;
            const auto* region = memory_.find(Gpa(at));
            if (region == nullptr) return nullptr;
            const u64 entry =
                __atomic_load_n(reinterpret_cast<u64*>(region->host(at)), __ATOMIC_ACQUIRE);
            if (!(entry & kPtePresent) || (user && !(entry & kPteUser)) ||
                (write && !(entry & kPteWritable))) {
                return nullptr;
            }
            table = entry & kPteAddress;
            if (shift == 12) break;
        }
        const u64 gpa = table | (gva & kPageMask);
        const auto* region = memory_.find(Gpa(gpa));
        return region == nullptr ? nullptr : region->host(gpa);
    }
    Frame* frame() const {
        using process::Supervisor;
        const u64 at =
            Supervisor::kCpus + (id_ + 1) * Supervisor::kCpuPages * kPageSize - sizeof(Frame);
        return reinterpret_cast<Frame*>(translate_to_host(at, true, false));
    }
    // In one of the monitor's ways back: the IRET at their end.
    void take_frame() {
        if (registers.rip < process::Supervisor::kBase) return;
        const Frame* left = frame();
        registers.rip = left->rip;
        registers.rflags = left->rflags;
        registers.gpr[kRsp] = left->rsp;
    }
    Exit page_fault(Exit exit) {
        constexpr u8 kPageFault = 14;
        constexpr u64 kUser = 4, kWrite = 2;
        *frame() = {kUser | (fault_->write ? kWrite : 0),
                    kText,
                    process::Supervisor::kUserCode,
                    0x202,
                    registers.gpr[kRsp],
                    process::Supervisor::kUserData};
        state_.cr2 = fault_->gva;
        return leave(exit, process::Supervisor::kGates + kPageFault * 16, kPageFault);
    }
    Exit leave(Exit exit, u64 rip, u8 port) {
        registers.rip = rip;
        exit.reason = hypercalls_ ? ExitReason::kHypercall : ExitReason::kIo;
        exit.address = port;
        return exit;
    }

    GuestMemory& memory_;
    const u32 id_;
    const bool hypercalls_;
    std::unique_ptr<FakeProgram> program_;
    CpuState state_;
    std::atomic<bool> stop_{false};
    std::optional<Fault> fault_;
};

class FakeEngine final : public Engine {
  public:
    FakeEngine(const EngineConfig& config, bool hypercalls, MakeProgram make)
        : config_(config), hypercalls_(hypercalls), make_(std::move(make)) {}
    Caps caps() const override { return {.instruction_budget = hypercalls_}; }
    const char* name() const override { return "fake"; }
    DirtyLog& dirty_log() override { return log_; }
    std::unique_ptr<Vcpu> create_vcpu(u32 id, LocalInterrupts*) override {
        return std::make_unique<FakeVcpu>(config_, id, hypercalls_, make_(id));
    }

  private:
    struct NoLog final : DirtyLog {
        const char* method() const override { return "none"; }
        bool active() const override { return false; }
        void start() override {}
        void stop() override {}
        void fetch(const GuestMemory::Region&, std::span<u64>) override {}
    };
    EngineConfig config_;
    bool hypercalls_;
    MakeProgram make_;
    NoLog log_;
};

}  // namespace pvtest
