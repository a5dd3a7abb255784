// One soft vCPU: frame, environment, translation state, blocks, and the loop that ties them
// together.
#pragma once

#include <condition_variable>
#include <mutex>

#include "cpu/engine.hpp"
#include "mmu/walker.hpp"
#include "soft/block_cache.hpp"
#include "soft/dirty_log.hpp"
#include "soft/environment.hpp"

namespace polyvisor::soft {

class SoftVcpu final : public Vcpu {
  public:
    SoftVcpu(const EngineConfig& config, CodePages& pages, SoftDirtyLog& dirty_log, u32 id,
             LocalInterrupts* lapic);
    ~SoftVcpu() override;

    Exit run() override;
    void request_stop() override;
    void set_instruction_budget(u64 instructions) override { remaining_ = instructions; }
    void set_debug(const GuestDebug& debug) override;
    void raise_int3() override { frame.host_int3 = VcpuFrame::Int3::kRaiseOnce; }
    CpuState save() const override;
    void restore(const CpuState& state) override;
    GeneralRegisters general() const override;
    void set_general(const GeneralRegisters& registers) override;
    u32 id() const override { return env.id; }
    bool translate(u64 gva, u64& gpa) const override;
    std::vector<Counter> counters() const override;

    void interrupt() override { request(kRequestInterrupt); }
    void nmi() override { request(kRequestNmi); }
    void smi() override { request(kRequestSmi); }
    void init() override { request(kRequestInit); }
    void sipi(u8 vector) override;

    /// From any thread: asks it to drop its writable translations (see soft/dirty_log.hpp). Once
    /// rearmed() says yes to the returned ticket, it stores through none that is older.
    u64 post_rearm() {
        frame.irq_req.fetch_or(kRequestRearm);
        return passage_.load();
    }
    bool rearmed(u64 ticket) const { return !(ticket & 1) || passage_.load() != ticket; }

    /// INT3 while the host has breakpoints: leaves run() with RIP at it. Returns false.
    bool exit_int3();
    /// Instructions retired before the one being executed.
    u64 instructions_now() const;

    // What the files of this folder share; not for anybody else.
    VcpuFrame frame;
    Environment env;
    TableReader tables;
    PagingState paging;
    BlockCache blocks;

    /// The block at the frame's RIP in `mode`, made if need be; nullptr with a fault pending.
    Block* find_block(u32 mode);
    /// GPA of the code at `linear`; false: fault pending.
    bool fetch_address(u64 linear, u64& gpa);
    /// Runs everything through the generic operations: the reference that tests compare with.
    void set_generic_only() { generic_only_ = true; }

    struct Statistics {
        u64 tlb_fills = 0, tlb_flushes = 0, dispatches = 0, faults = 0, interrupts = 0, mmio = 0,
            slow_accesses = 0, revalidations = 0, code_stores = 0;
    } stats;

  private:
    struct FetchEntry {
        u64 page = ~u64{0};
        u64 gpa = 0;
        u64 epoch = 0;
        u8 cpl = 0;
    };

    friend class InGuest;
    friend class OutsideGuest;
    void enter_guest();
    void leave_guest() {
        passage_.store(passage_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    }
    void rearm();

    void request(u32 bits);
    bool take_requests(Exit& exit);
    bool deliver_pending(Exit& exit);
    void dispatch();
    // debug.cpp
    bool before_step();
    void after_step(bool trap);
    bool host_breakpoint(u64 linear);
    bool host_step_done(Exit& exit);
    bool holds_events();
    void wake_without_event();
    bool wait_while_halted(Exit& exit);
    void advance_clock();
    void run_timers();
    s64 slice_length();
    Block* make_block(u64 gpa, u64 linear, u32 mode);
    bool revalidate(Block& block);

    SoftDirtyLog& dirty_log_;
    /// Odd while the vCPU may store to guest memory; changes too when it has dropped its writable
    /// translations.
    std::atomic<u64> passage_{0};
    JumpCache jump_cache_;
    FetchEntry fetch_tlb_[128];
    u64 remaining_ = ~u64{0};  ///< of the caller's instruction budget
    s64 slice_ = 0;            ///< frame.budget at the slice's start
    u64 ns_per_1000_;
    bool interrupt_waiting_ = false;  ///< pending() was true, but IF or a shadow held it back
    bool halt_reported_ = false;
    bool generic_only_ = false;
    u32 host_hits_ = 0;      ///< DR6 of the kDebug exit that run() owes the host
    u64 passing_ = ~u64{0};  ///< linear RIP of the host's breakpoint that ended the last run()
    std::atomic<u8> sipi_vector_{0};
    std::mutex halt_mutex_;  // a leaf
    std::condition_variable halt_wake_;

    friend u64 read_tsc(VcpuFrame& f);
};

/// While it lives the thread executes guest code, and whoever wants the vCPU's attention may wait
/// for it to come by: it holds no lock that a device takes.
class InGuest {
  public:
    explicit InGuest(SoftVcpu& vcpu) : vcpu_(vcpu) { vcpu_.enter_guest(); }
    ~InGuest() { vcpu_.leave_guest(); }
    InGuest(const InGuest&) = delete;

  private:
    SoftVcpu& vcpu_;
};

/// Within an InGuest: a device or a wait, of any length. Host addresses of guest memory taken
/// before are not good for stores after.
class OutsideGuest {
  public:
    explicit OutsideGuest(SoftVcpu& vcpu) : vcpu_(vcpu) { vcpu_.leave_guest(); }
    ~OutsideGuest() { vcpu_.enter_guest(); }
    OutsideGuest(const OutsideGuest&) = delete;

  private:
    SoftVcpu& vcpu_;
};

}  // namespace polyvisor::soft
