// The two faces of the local APIC's registers: 32-bit words in a page (xAPIC, SDM 3A 11.4), and
// MSRs with #GP for what is reserved (x2APIC, SDM 3A 11.12). Registers are numbered as in the MSR
// space: page offset / 16.
#include "irqchip/lapic_detail.hpp"

#include <cstring>

namespace polyvisor::irqchip {

namespace {

constexpr u32 kRegId = 0x02, kRegVersion = 0x03, kRegTpr = 0x08, kRegApr = 0x09, kRegPpr = 0x0a,
              kRegEoi = 0x0b, kRegRrd = 0x0c, kRegLdr = 0x0d, kRegDfr = 0x0e, kRegSvr = 0x0f,
              kRegIsr = 0x10, kRegTmr = 0x18, kRegIrr = 0x20, kRegEsr = 0x28, kRegIcr = 0x30,
              kRegIcrHigh = 0x31, kRegLvt = 0x32, kRegInitialCount = 0x38, kRegCurrentCount = 0x39,
              kRegDivide = 0x3e, kRegSelfIpi = 0x3f;

constexpr u32 kMsrApicBase = 0x1b, kMsrTscDeadline = 0x6e0, kMsrX2apic = 0x800;
constexpr u32 kIcrWritable = 0xccfff;  // without delivery status and the reserved bits
constexpr u64 kX2IcrReserved = 0xfff3'2000;

// Register kRegLvt + n is Lvt entry n.
static_assert(Lapic::kTimer == 0 && Lapic::kError == 5);

}  // namespace

u32 Lapic::lvt_writable(unsigned which, const Config& config) {
    switch (which) {
        case kTimer:
            return 0xff | kLvtMasked | (1u << 17) | (config.tsc_deadline ? 1u << 18 : 0);
        case kLint0:
        case kLint1:
            return 0x7ff | kLvtPolarity | kLvtLevel | kLvtMasked;
        case kError:
            return 0xff | kLvtMasked;
        default:
            return 0x7ff | kLvtMasked;
    }
}

void Lapic::update_mmio_base() {
    u64 base = state_.apic_base & base_address_mask(config_.physical_bits);
    bool page = hardware_enabled() && !in_x2apic();
    mmio_base_.store(page ? base : ~u64{0}, std::memory_order_relaxed);
}

// SDM 3A 11.12.5 and figure 11-27: which mode changes are legal.
bool Lapic::write_apic_base(u64 value, Outcome& out) {
    u64 legal = kBaseBsp | kBaseEnable | base_address_mask(config_.physical_bits) |
                (config_.x2apic ? kBaseX2apic : 0);
    if (value & ~legal) return false;
    bool was_x2 = state_.apic_base & kBaseX2apic;
    bool x2 = value & kBaseX2apic, enable = value & kBaseEnable;
    if (x2 && !enable) return false;
    if (x2 && !hardware_enabled()) return false;
    if (was_x2 && enable && !x2) return false;
    bool was_enabled = hardware_enabled();
    state_.apic_base = value;
    if (was_enabled && !enable) reset_registers();
    if (x2 && !was_x2) {
        state_.icr &= 0xffffffff;  // the destination has another format now
        state_.ldr = 0;            // follows from the id as long as this mode lasts
    }
    update_mmio_base();
    update(out);
    return true;
}

bool Lapic::read_register(u32 index, u64& value) const {
    value = 0;
    if (index >= kRegIsr && index < kRegIsr + 8) {
        value = state_.isr[index - kRegIsr];
    } else if (index >= kRegTmr && index < kRegTmr + 8) {
        value = state_.tmr[index - kRegTmr];
    } else if (index >= kRegIrr && index < kRegIrr + 8) {
        value = state_.irr[index - kRegIrr];
    } else if (index >= kRegLvt && index < kRegLvt + kLvtCount) {
        value = state_.lvt[index - kRegLvt];
    } else {
        switch (index) {
            case kRegId:
                value = in_x2apic() ? config_.id : (config_.id & 0xff) << 24;
                break;
            case kRegVersion:
                value =
                    kVersion | (kLvtCount - 1) << 16 | bit(24);  // EOI broadcasts can be suppressed
                break;
            case kRegTpr:
                value = state_.tpr;
                break;
            case kRegPpr:
                value = processor_priority();
                break;
            case kRegLdr:
                value = logical_id();
                break;
            case kRegSvr:
                value = state_.svr;
                break;
            case kRegEsr:
                value = state_.esr;
                break;
            case kRegIcr:
                value = in_x2apic() ? state_.icr : static_cast<u32>(state_.icr);
                break;
            case kRegInitialCount:
                value = state_.initial_count;
                break;
            case kRegCurrentCount:
                value = current_count();
                break;
            case kRegDivide:
                value = state_.divide;
                break;
            // From here on: xAPIC only.
            case kRegApr: {  // arbitration is not a matter of priority here: show the processor's
                value = processor_priority();
                return !in_x2apic();
            }
            case kRegRrd:
                return !in_x2apic();
            case kRegDfr:
                value = state_.dfr;
                return !in_x2apic();
            case kRegIcrHigh:
                value = state_.icr >> 32;
                return !in_x2apic();
            case kRegEoi:  // write-only; as a page it reads zero
                return !in_x2apic();
            default:
                return false;
        }
    }
    return true;
}

void Lapic::write_svr(u32 value) {
    state_.svr = value & kSvrWritable;
    if (software_enabled()) return;
    for (u32& lvt : state_.lvt) lvt |= kLvtMasked;
}

void Lapic::write_lvt(unsigned which, u32 value, Outcome& out) {
    u32 writable = lvt_writable(which, config_);
    u32 next = (value & writable) | (state_.lvt[which] & kLvtRemoteIrr);
    if (!software_enabled()) next |= kLvtMasked;
    if (which == kTimer) {
        u32 before = timer_mode(), after = (next >> 17) & 3;
        // SDM 3A 11.5.4.1: going to or from TSC-deadline mode disarms the timer.
        if ((before == 2) != (after == 2)) stop_timer();
    }
    if (!(next & kLvtLevel)) next &= ~kLvtRemoteIrr;
    state_.lvt[which] = next;
    if (which == kLint0 || which == kLint1) {
        bool high = state_.lint >> (which - kLint0) & 1;
        if (high && (next & kLvtLevel)) fire_lvt(which, out);  // a level that waited unmasked
    }
    update(out);
}

// SDM 3A 11.6.1.
void Lapic::write_icr(u64 value, Outcome& out) {
    u32 low = static_cast<u32>(value) & kIcrWritable;
    u32 high = static_cast<u32>(value >> 32);
    state_.icr = static_cast<u64>(high) << 32 | low;
    ApicMessage& message = out.message;
    message.mode = mode_of(low);
    message.vector = static_cast<u8>(low);
    message.logical = low & (1u << 11);
    message.assert_level = low & (1u << 14);
    message.level_triggered = false;  // the trigger mode only matters for INIT de-assert
    message.destination = in_x2apic() ? high : high >> 24;
    out.broadcast = in_x2apic() ? ~0u : 0xff;
    out.shorthand = static_cast<Shorthand>(low >> 18 & 3);
    bool fixed = message.mode <= DeliveryMode::kLowestPriority;
    if (fixed && message.vector < 16) {
        error(kErrorSendVector, out);
        return;
    }
    if (message.mode == DeliveryMode::kReserved || message.mode == DeliveryMode::kExtInt) return;
    if (message.mode == DeliveryMode::kInit) {
        // "INIT level de-assert" only sets arbitration ids, which nothing here has.
        if ((low & (1u << 15)) && !message.assert_level) return;
        message.assert_level = true;
    }
    // A shorthand names targets by itself; only "all but self" works for anything but fixed
    // (table 11-3), the other combinations are invalid and not sent.
    bool self = out.shorthand == Shorthand::kSelf || out.shorthand == Shorthand::kAll;
    if (self && message.mode != DeliveryMode::kFixed) return;
    out.send = true;
}

// Registers that both faces write alike. False: there is no such register to write.
bool Lapic::write_register(u32 index, u32 value, Outcome& out) {
    if (index >= kRegLvt && index < kRegLvt + kLvtCount) {
        write_lvt(index - kRegLvt, value, out);
        return true;
    }
    switch (index) {
        case kRegTpr:
            state_.tpr = value & 0xff;
            update(out);
            return true;
        case kRegEoi:
            end_of_interrupt(out);
            return true;
        case kRegSvr:
            write_svr(value);
            update(out);
            return true;
        case kRegEsr:
            state_.esr = state_.esr_pending;
            state_.esr_pending = 0;
            return true;
        case kRegInitialCount:
            start_timer(value);
            return true;
        case kRegDivide:
            rescale_timer(value & 0xb);
            return true;
        default:
            return false;
    }
}

bool Lapic::write_x2apic(u32 index, u64 value, Outcome& out) {
    if (index == kRegIcr) {
        if (value & kX2IcrReserved) return false;
        write_icr(value, out);
        return true;
    }
    if (index == kRegSelfIpi) {
        if (value > 0xff) return false;
        if (value < 16) {
            error(kErrorSendVector, out);
            return true;
        }
        if (software_enabled()) receive_fixed(static_cast<u8>(value), false, out);
        return true;
    }
    u64 legal = 0;
    if (index >= kRegLvt && index < kRegLvt + kLvtCount) {
        // The read-only status bits may be written back as they were read.
        legal = lvt_writable(index - kRegLvt, config_) | kLvtDelivStatus;
        if (index == kRegLvt + kLint0 || index == kRegLvt + kLint1) legal |= kLvtRemoteIrr;
    } else {
        switch (index) {
            case kRegTpr:
                legal = 0xff;
                break;
            case kRegSvr:
                legal = kSvrWritable;
                break;
            case kRegInitialCount:
                legal = 0xffffffff;
                break;
            case kRegDivide:
                legal = 0xb;
                break;
            default:  // EOI and ESR: zero only
                break;
        }
    }
    if (value & ~legal) return false;
    return write_register(index, static_cast<u32>(value), out);
}

bool Lapic::read_msr(u32 index, u64& value) {
    std::lock_guard lock(mutex_);
    if (index == kMsrApicBase) {
        value = state_.apic_base;
        return true;
    }
    if (index == kMsrTscDeadline) {
        value = state_.tsc_deadline;
        return config_.tsc_deadline;
    }
    if (index < kMsrX2apic || index > kMsrX2apic + 0xff || !in_x2apic()) return false;
    return read_register(index - kMsrX2apic, value);
}

bool Lapic::write_msr(u32 index, u64 value) {
    Outcome out;
    bool fine = false;
    {
        std::lock_guard lock(mutex_);
        if (index == kMsrApicBase) {
            fine = write_apic_base(value, out);
        } else if (index == kMsrTscDeadline) {
            fine = config_.tsc_deadline;
            if (fine) write_tsc_deadline(value, out);
        } else if (index >= kMsrX2apic && index <= kMsrX2apic + 0xff && in_x2apic()) {
            fine = write_x2apic(index - kMsrX2apic, value, out);
        }
    }
    finish(out);
    return fine;
}

void Lapic::mmio_read(u32 offset, std::span<u8> data) {
    Outcome out;
    {
        std::lock_guard lock(mutex_);
        u64 value = 0;
        u32 within = offset & 15;
        if (within < 4 && !read_register(offset >> 4, value)) error(kErrorRegister, out);
        for (u8& byte : data) {  // only the first four bytes of sixteen are the register
            byte = static_cast<u8>(within < 4 ? value >> (8 * within) : 0);
            ++within;
        }
    }
    finish(out);
}

void Lapic::mmio_write(u32 offset, std::span<const u8> data) {
    // SDM 3A 11.4.1: only aligned 32-bit accesses are defined; others are dropped, as hardware may.
    if (data.size() != 4 || (offset & 15) != 0) return;
    u32 value;
    std::memcpy(&value, data.data(), sizeof value);
    Outcome out;
    {
        std::lock_guard lock(mutex_);
        u32 index = offset >> 4;
        u64 ignored;
        switch (index) {
            case kRegIcr:
                write_icr((state_.icr & 0xffffffff'00000000ull) | value, out);
                break;
            case kRegIcrHigh:
                state_.icr = (state_.icr & 0xffffffff) | static_cast<u64>(value & 0xff000000) << 32;
                break;
            case kRegLdr:
                state_.ldr = value & 0xff000000;
                break;
            case kRegDfr:
                state_.dfr = value | 0x0fffffff;
                break;
            default:
                // A read-only register ignores the write; one that does not exist is an error.
                if (!write_register(index, value, out) && !read_register(index, ignored)) {
                    error(kErrorRegister, out);
                }
        }
    }
    finish(out);
}

}  // namespace polyvisor::irqchip
