// What each of KVM's exits means (virt/kvm/api, "the kvm_run structure"). Accesses that a device
// claims are served here, without another word to anybody; the rest become the Exit that run()
// returns.
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "base/error.hpp"
#include "kvm/bus_hooks.hpp"
#include "kvm/chips.hpp"
#include "kvm/cpu_state.hpp"
#include "kvm/debug.hpp"
#include "kvm/dirty_log.hpp"
#include "kvm/exit_names.hpp"
#include "kvm/vcpu.hpp"

namespace polyvisor::kvm {

namespace {

constexpr u32 kApicBaseMsr = 0x1b, kTscDeadlineMsr = 0x6e0, kX2apicFirst = 0x800,
              kX2apicLast = 0x8ff;

bool is_apic_msr(u32 index) {
    return index == kApicBaseMsr || index == kTscDeadlineMsr ||
           (index >= kX2apicFirst && index <= kX2apicLast);
}

const char* suberror_name(u32 suberror) {
    switch (suberror) {
        case KVM_INTERNAL_ERROR_EMULATION:
            return "KVM cannot emulate the instruction";
        case KVM_INTERNAL_ERROR_SIMUL_EX:
            return "exceptions came together that KVM cannot merge";
        case KVM_INTERNAL_ERROR_DELIVERY_EV:
            return "an event could not be delivered";
        case KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON:
            return "the CPU left the guest for a reason that KVM does not know";
        default:
            return "an error that this version does not know";
    }
}

void append(std::string& text, const char* format, ...) __attribute__((format(printf, 2, 3)));
void append(std::string& text, const char* format, ...) {
    char part[160];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(part, sizeof part, format, arguments);
    va_end(arguments);
    text += part;
}

void append_bytes(std::string& text, const u8* bytes, std::size_t count) {
    for (std::size_t n = 0; n < count; ++n) append(text, " %02x", bytes[n]);
}

}  // namespace

KvmVcpu::Then KvmVcpu::handle(Exit& exit) {
    switch (run_->exit_reason) {
        case KVM_EXIT_IO:
            return handle_io(exit);
        case KVM_EXIT_MMIO:
            return handle_mmio(exit);
        case KVM_EXIT_IRQ_WINDOW_OPEN:
        case KVM_EXIT_INTR:
        case KVM_EXIT_SET_TPR:  // run() looks at CR8 after every exit
        case KVM_EXIT_TPR_ACCESS:
        case KVM_EXIT_X86_BUS_LOCK:
            return Then::kEnter;
        case KVM_EXIT_HLT:
            activity_ = Activity::kHalted;
            halt_reported_ = false;
            return Then::kEnter;
        case KVM_EXIT_X86_RDMSR:
            handle_msr(false);
            return Then::kEnter;
        case KVM_EXIT_X86_WRMSR:
            handle_msr(true);
            return Then::kEnter;
        case KVM_EXIT_IOAPIC_EOI:
            if (vm_.chips() != nullptr) vm_.chips()->ended(run_->eoi.vector);
            return Then::kEnter;
        case KVM_EXIT_DIRTY_RING_FULL:
            vm_.dirty_log().collect(id_);
            return Then::kEnter;
        case KVM_EXIT_DEBUG:
            return debug_exit(*this, exit) ? Then::kReturn : Then::kEnter;
        case KVM_EXIT_SHUTDOWN:
            activity_ = Activity::kShutdown;
            exit = {};
            exit.reason = ExitReason::kShutdown;
            exit.text = "triple fault; " + describe();
            return Then::kReturn;
        case KVM_EXIT_FAIL_ENTRY: {
            std::string what;
            append(what, "the CPU refuses to enter the guest (hardware reason %#" PRIx64 ")",
                   static_cast<u64>(run_->fail_entry.hardware_entry_failure_reason));
            return fail(exit, what);
        }
        case KVM_EXIT_EXCEPTION: {
            std::string what;
            append(what, "KVM reports exception %u with error code %#x", run_->ex.exception,
                   run_->ex.error_code);
            return fail(exit, what);
        }
        case KVM_EXIT_INTERNAL_ERROR: {
            std::string what = suberror_name(run_->internal.suberror);
            append(what, " (KVM internal error, suberror %u", run_->internal.suberror);
            bool emulation = run_->internal.suberror == KVM_INTERNAL_ERROR_EMULATION;
            const auto& failure = run_->emulation_failure;
            if (emulation && failure.ndata > 0 &&
                (failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES)) {
                what += "; instruction bytes";
                append_bytes(what, failure.insn_bytes,
                             std::min<std::size_t>(failure.insn_size, sizeof failure.insn_bytes));
            } else {
                u32 count = std::min<u32>(run_->internal.ndata, 16);
                if (count != 0) what += "; data";
                for (u32 n = 0; n < count; ++n) {
                    append(what, " %#" PRIx64, static_cast<u64>(run_->internal.data[n]));
                }
            }
            return fail(exit, what + ")");
        }
        case KVM_EXIT_SYSTEM_EVENT: {
            std::string what;
            append(what, "KVM ends the machine with system event %u", run_->system_event.type);
            return fail(exit, what);
        }
        default:
            return fail(exit, std::string("KVM left the guest for ") +
                                  exit_name(run_->exit_reason) +
                                  ", which no machine here asks for");
    }
}

KvmVcpu::Then KvmVcpu::handle_io(Exit& exit) {
    const auto& io = run_->io;
    u8* data = reinterpret_cast<u8*>(run_) + io.data_offset;
    bool write = io.direction == KVM_EXIT_IO_OUT;
    if (vm_.bare()) {
        exit = {};
        exit.reason = ExitReason::kIo;
        exit.write = write;
        exit.size = io.size;
        exit.address = io.port;
        return Then::kReturn;
    }
    incomplete_ = true;
    bool claimed = true;
    for (u32 n = 0; n < io.count; ++n, data += io.size) {
        std::span<u8> bytes(data, io.size);
        bool served =
            write ? vm_.config().pio.write(io.port, bytes) : vm_.config().pio.read(io.port, bytes);
        if (PV_LIKELY(served) || !claimed) continue;
        claimed = false;
        exit = {};
        exit.reason = ExitReason::kIo;
        exit.write = write;
        exit.size = io.size;
        exit.address = io.port;
        std::memcpy(exit.data.data(), data, std::min<std::size_t>(io.size, exit.data.size()));
    }
    return claimed ? Then::kEnter : Then::kReturn;
}

KvmVcpu::Then KvmVcpu::handle_mmio(Exit& exit) {
    auto& mmio = run_->mmio;
    u64 address = mmio.phys_addr;
    std::span<u8> bytes(mmio.data, std::min<u32>(mmio.len, sizeof mmio.data));
    incomplete_ = true;
    if (user_lapic() && PV_LIKELY(lapic_ != nullptr) && address - lapic_->mmio_base() < kPageSize) {
        u32 offset = static_cast<u32>(address - lapic_->mmio_base());
        mmio.is_write ? lapic_->mmio_write(offset, bytes) : lapic_->mmio_read(offset, bytes);
        interrupt_waiting_ = true;
        return Then::kEnter;
    }
    Bus& bus = vm_.config().mmio;
    if (PV_LIKELY(mmio.is_write ? bus.write(address, bytes) : bus.read(address, bytes))) {
        return Then::kEnter;
    }
    // A store to read-only memory: dropped, as ROM does.
    if (mmio.is_write && vm_.config().memory.find(Gpa(address)) != nullptr) return Then::kEnter;
    exit = {};
    exit.reason = ExitReason::kMmio;
    exit.write = mmio.is_write;
    exit.size = static_cast<u8>(bytes.size());
    exit.address = address;
    std::memcpy(exit.data.data(), bytes.data(), bytes.size());
    return Then::kReturn;
}

// Our own local APIC's registers in mode kUser; otherwise MSRs that KVM does not know: #GP.
void KvmVcpu::handle_msr(bool write) {
    auto& msr = run_->msr;
    incomplete_ = true;
    msr.error = 1;
    if (user_lapic() && lapic_ != nullptr && is_apic_msr(msr.index)) {
        // The deadline is in the guest's ticks, our timer runs on the machine's clock.
        u64 ahead = 0;
        if (msr.index == kTscDeadlineMsr) {
            ahead = tsc_offset() + static_cast<u64>(vm_.clock().drift(fd()));
        }
        bool known;
        if (write) {
            u64 value = msr.data;
            if (value != 0 && ahead != 0) {
                u64 shifted = value - ahead;
                value = static_cast<s64>(shifted) <= 0 && static_cast<s64>(value) > 0 ? 1 : shifted;
            }
            known = lapic_->write_msr(msr.index, value);
            interrupt_waiting_ = true;
        } else {
            u64 value = 0;
            known = lapic_->read_msr(msr.index, value);
            msr.data = value != 0 ? value + ahead : 0;
        }
        msr.error = !known;
        return;
    }
    if (vm_.config().log == nullptr) return;
    std::string line = write ? "write" : "read";
    append(line, " of unknown MSR %#x (%#" PRIx64 "): #GP", msr.index,
           static_cast<u64>(write ? msr.data : 0));
    vm_.config().log->note("msr", line);
}

KvmVcpu::Then KvmVcpu::fail(Exit& exit, std::string what) const {
    exit = {};
    exit.reason = ExitReason::kFail;
    exit.text = "CPU " + std::to_string(id_) + ": " + what + "; " + describe();
    return Then::kReturn;
}

// The registers that tell where it happened, and the bytes of the instruction there.
std::string KvmVcpu::describe() const {
    CpuState state;
    try {
        state = save();
    } catch (const Error& error) {
        return std::string("registers cannot be read: ") + error.what();
    }
    std::string text;
    append(text, "rip %04x:%" PRIx64 " rsp %" PRIx64 " rflags %" PRIx64,
           state.segments[kCs].selector, state.rip, state.gpr[kRsp], state.rflags);
    append(text, " cr0 %" PRIx64 " cr2 %" PRIx64 " cr3 %" PRIx64 " cr4 %" PRIx64 " efer %" PRIx64,
           state.cr0, state.cr2, state.cr3, state.cr4, state.msr.efer);
    bool long64 = (state.msr.efer & bit(10)) && state.segments[kCs].l();
    u64 linear = long64 ? state.rip : static_cast<u32>(state.segments[kCs].base + state.rip);
    u64 gpa = 0;
    u8 code[15];
    std::size_t count = 0;
    while (count < sizeof code && translate(linear + count, gpa)) {
        std::span<u8> byte = vm_.config().memory.span(Gpa(gpa), 1);
        if (byte.empty()) break;
        code[count++] = byte[0];
    }
    if (count != 0) {
        text += " code";
        append_bytes(text, code, count);
    }
    return text;
}

}  // namespace polyvisor::kvm
