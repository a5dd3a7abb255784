// The two faces between a CPU and its local APIC, so that neither folder knows the other: an
// engine's vCPU implements CpuSignals, a local APIC implements LocalInterrupts.
#pragma once

#include <span>

#include "base/types.hpp"

namespace polyvisor {

/// What a local APIC can do to its CPU. Every call is safe from any thread and returns at once: it
/// leaves a request that the vCPU takes up at its next instruction boundary, waking it when halted.
class CpuSignals {
  public:
    virtual ~CpuSignals() = default;
    /// pending() of the LocalInterrupts may have become true.
    virtual void interrupt() = 0;
    virtual void nmi() = 0;
    virtual void smi() = 0;
    virtual void init() = 0;
    /// Start-up at vector << 12, when waiting for it after INIT.
    virtual void sipi(u8 vector) = 0;
};

/// What a CPU asks of its local APIC.
class LocalInterrupts {
  public:
    virtual ~LocalInterrupts() = default;
    /// An external interrupt (fixed or ExtINT) is deliverable now, were IF set. Lock-free.
    virtual bool pending() const = 0;
    /// INTA: the vector to deliver, now in service; -1 when there is none after all.
    virtual int acknowledge() = 0;
    virtual u8 cr8() const = 0;
    virtual void set_cr8(u8 priority) = 0;
    /// IA32_APIC_BASE, IA32_TSC_DEADLINE and 0x800..0x8ff. False: #GP.
    virtual bool read_msr(u32 index, u64& value) = 0;
    virtual bool write_msr(u32 index, u64 value) = 0;
    /// The 4 KiB register page, when enabled in xAPIC mode; `base()` is where (~0: nowhere).
    virtual u64 mmio_base() const = 0;
    virtual void mmio_read(u32 offset, std::span<u8> data) = 0;
    virtual void mmio_write(u32 offset, std::span<const u8> data) = 0;
    /// CPU reset or INIT (INIT keeps the APIC id and base).
    virtual void reset(bool init) = 0;
};

}  // namespace polyvisor
