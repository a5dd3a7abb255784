// The ioctls that move a vCPU's state, and the order they have to be made in.
//
// Reading. KVM_GET_MP_STATE comes first, since it takes up INITs and start-up IPIs that its local
// APIC holds, which changes nearly everything else; then KVM_GET_VCPU_EVENTS, since it moves a
// pending exception's CR2 and DR6 to where the guest will look for them.
//
// Writing. CPUID has been set when the vCPU was made: KVM checks CR4, XCR0 and MSRs by it.
//   1. sregs   the mode. CR4.LA57 says what is canonical in MSRs; VMX takes RFLAGS.VM with segments
//              that are there.
//   2. regs    drops pending exceptions, so before events.
//   3. xcrs    before
//   4. xsave   so that no component is there that XCR0 leaves out.
//   5. debug registers
//   6. MSRs    stops at the first that KVM refuses, and tells which it was.
//   7. events  its NMI request and its injected event are for the registers above.
//   8. mp_state, because sregs makes CPU 0 runnable when it finds it at its reset vector.
// At the end the registers that decide on the mode are read again: KVMs without hardware behind
// them (PVM) take some modes and then do not have them.
#include "kvm/cpu_state.hpp"

#include <algorithm>
#include <cstdio>
#include <span>
#include <string>
#include <vector>

#include "kvm/convert.hpp"
#include "kvm/ioctl.hpp"
#include "kvm/msrs.hpp"
#include "kvm/vcpu.hpp"

namespace polyvisor::kvm {

namespace {

/// What KVM keeps of a vCPU, as far as it is part of CpuState.
struct Parts {
    kvm_mp_state activity{};
    kvm_vcpu_events events{};
    kvm_regs regs{};
    kvm_sregs sregs{};
    kvm_xcrs xcrs{};  // nr_xcrs 0: there are none
    std::vector<u8> xsave;
    kvm_debugregs debug{};
    std::vector<kvm_msr_entry> msrs;
};

/// Which part KVM refused, and its errno.
struct Refusal {
    unsigned long request = 0;
    int error = 0;
    u32 msr = 0;  // KVM_SET_MSRS
};

std::vector<u8> read_xsave(const KvmVcpu& vcpu) {
    std::vector<u8> area(vcpu.xsave_size());
    call_ioctl(vcpu.fd(), area.size() > sizeof(kvm_xsave) ? KVM_GET_XSAVE2 : KVM_GET_XSAVE,
               area.data());
    return area;
}

/// A vCPU as this file needs it.
class Access {
  public:
    explicit Access(const KvmVcpu& vcpu)
        : vcpu_(vcpu),
          places_(msr_places(vcpu.vm().system(), vcpu.vm().config().cpuid)),
          has_xcrs_(vcpu.vm().check(KVM_CAP_XCRS) > 0) {}

    bool has_xcrs() const { return has_xcrs_; }
    std::size_t xsave_size() const { return vcpu_.xsave_size(); }
    const CpuidPolicy& policy() const { return vcpu_.vm().config().cpuid; }
    std::span<const MsrPlace> places() const { return places_; }

    Parts read() const {
        Parts p;
        if (!vcpu_.user_lapic()) get(KVM_GET_MP_STATE, &p.activity);
        get(KVM_GET_VCPU_EVENTS, &p.events);
        get(KVM_GET_REGS, &p.regs);
        get(KVM_GET_SREGS, &p.sregs);
        if (has_xcrs_) get(KVM_GET_XCRS, &p.xcrs);
        p.xsave = read_xsave(vcpu_);
        get(KVM_GET_DEBUGREGS, &p.debug);
        p.msrs = read_msrs(vcpu_.fd(), places_);
        return p;
    }

    /// Those of the registers that decide on the CPU's mode, as KVM has them.
    CpuState read_mode() const {
        CpuState state;
        kvm_sregs sregs{};
        kvm_regs regs{};
        get(KVM_GET_SREGS, &sregs);
        get(KVM_GET_REGS, &regs);
        from_kvm(sregs, state);
        from_kvm(regs, state);
        return state;
    }

    /// Stops at the first part that KVM refuses. False: `refusal` says which.
    bool write(const Parts& wanted, const Parts& before, Refusal& refusal) const {
        Parts p = wanted;  // the kernel takes pointers to what it only reads
        return write_sregs(p.sregs, before.sregs, refusal) && set(KVM_SET_REGS, &p.regs, refusal) &&
               (p.xcrs.nr_xcrs == 0 || set(KVM_SET_XCRS, &p.xcrs, refusal)) &&
               set(KVM_SET_XSAVE, p.xsave.data(), refusal) &&
               set(KVM_SET_DEBUGREGS, &p.debug, refusal) &&
               write_msrs(p.msrs, before.msrs, refusal) &&
               set(KVM_SET_VCPU_EVENTS, &p.events, refusal) &&
               (vcpu_.user_lapic() || set(KVM_SET_MP_STATE, &p.activity, refusal));
    }

  private:
    template <class Part>
    void get(unsigned long request, Part* part) const {
        call_ioctl(vcpu_.fd(), request, part);
    }
    template <class Part>
    bool set(unsigned long request, Part* part, Refusal& refusal) const {
        int result = try_ioctl(vcpu_.fd(), request, part);
        if (result < 0) refusal = {request, -result};
        return result >= 0;
    }

    // KVM forgets translations only when a register changes that decides on them, but the page
    // tables may be others than before, too (a snapshot). CR0.MP has no effect on anything else
    // before the vCPU runs.
    bool write_sregs(kvm_sregs& sregs, const kvm_sregs& before, Refusal& refusal) const {
        constexpr u64 kMonitorCoprocessor = bit(1);
        if (sregs.cr0 == before.cr0 && sregs.cr3 == before.cr3 && sregs.cr4 == before.cr4 &&
            sregs.efer == before.efer) {
            kvm_sregs other = sregs;
            other.cr0 ^= kMonitorCoprocessor;
            if (!set(KVM_SET_SREGS, &other, refusal)) return false;
        }
        return set(KVM_SET_SREGS, &sregs, refusal);
    }

    bool write_msrs(std::vector<kvm_msr_entry>& msrs, const std::vector<kvm_msr_entry>& before,
                    Refusal& refusal) const {
        // Setting the wall clock's address makes KVM write there, to what may be in other use by
        // now; and the address is the VM's, so that one CPU's zero is not every CPU's.
        std::erase_if(msrs, [&](const kvm_msr_entry& entry) {
            if (entry.index != kKvmWallClockMsr) return false;
            if (entry.data == 0 && vcpu_.id() != 0) return true;
            for (const kvm_msr_entry& old : before) {
                if (old.index == entry.index) return old.data == entry.data;
            }
            return false;
        });
        std::size_t count = kvm::write_msrs(vcpu_.fd(), msrs);
        if (count < msrs.size()) refusal = {KVM_SET_MSRS, EINVAL, msrs[count].index};
        return count >= msrs.size();
    }

    const KvmVcpu& vcpu_;
    std::vector<MsrPlace> places_;
    bool has_xcrs_;
};

std::string of_vcpu(const KvmVcpu& vcpu) {
    return "CPU state of vCPU " + std::to_string(vcpu.id()) + ": ";
}

std::string hex(u64 value) {
    char text[24];
    std::snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(value));
    return text;
}

/// `parts`: what KVM has now, becomes the state.
void convert(const KvmVcpu& vcpu, const Access& access, const CpuState& state, Parts& parts) {
    to_kvm(state, parts.activity);
    to_kvm(state, parts.events);
    to_kvm(state, parts.regs);
    to_kvm(state, parts.sregs);
    to_kvm(state, parts.xcrs);
    to_kvm(state.fpu, access.policy().features.has(Feature::kAvx), parts.xsave);
    to_kvm(state, parts.debug);
    auto entry = parts.msrs.begin();
    for (const MsrPlace& place : access.places()) {
        const u64 value = place.get(state.msr);
        if (entry != parts.msrs.end() && entry->index == place.index) {
            entry++->data = value;
        } else if (value != place.get(MsrState{})) {
            throw StateError(place.field, of_vcpu(vcpu) + place.field + " is " + hex(value) +
                                              ", but this host's KVM has no MSR " +
                                              hex(place.index) + ".");
        }
    }
}

struct Group {
    unsigned long request;
    const char* field;
    const char* what;
};

constexpr Group kGroups[] = {
    {KVM_SET_SREGS, "sregs", "the control and segment registers"},
    {KVM_SET_REGS, "regs", "the general registers"},
    {KVM_SET_XCRS, "xcr0", "XCR0"},
    {KVM_SET_XSAVE, "fpu", "the FPU's registers"},
    {KVM_SET_DEBUGREGS, "dr", "the debug registers"},
    {KVM_SET_VCPU_EVENTS, "event", "the events"},
    {KVM_SET_MP_STATE, "activity", "the activity"},
};

[[noreturn]] void refused(const KvmVcpu& vcpu, const Access& access, const CpuState& state,
                          const Refusal& refusal) {
    const std::string by = ", which KVM refused (" + request_name(refusal.request) + ").";
    if (refusal.request == KVM_SET_MSRS) {
        for (const MsrPlace& place : access.places()) {
            if (place.index != refusal.msr) continue;
            throw StateError(place.field, of_vcpu(vcpu) + place.field + " (MSR " +
                                              hex(place.index) + ") is " +
                                              hex(place.get(state.msr)) + by);
        }
    }
    for (const Group& group : kGroups) {
        if (group.request != refusal.request) continue;
        std::string values;
        if (refusal.request == KVM_SET_SREGS) {
            values = " with CR0 " + hex(state.cr0) + ", CR3 " + hex(state.cr3) + ", CR4 " +
                     hex(state.cr4) + " and EFER " + hex(state.msr.efer);
        }
        throw StateError(group.field, of_vcpu(vcpu) + group.what + " are" + values +
                                          " such as no vCPU can have" + by);
    }
    throw_ioctl(refusal.request, refusal.error);
}

/// The field that decides on the mode and is not what it was set to; nullptr when all are.
const char* lost(const CpuState& got, const CpuState& want) {
    constexpr u64 kVm86 = bit(17);
    if (got.cr0 != want.cr0) return "cr0";
    if (got.cr3 != want.cr3) return "cr3";
    if (got.cr4 != want.cr4) return "cr4";
    if (got.msr.efer != want.msr.efer) return "msr.efer";
    if ((got.rflags ^ want.rflags) & kVm86) return "rflags";
    return nullptr;
}

// KVM's own values of a new vCPU (SDM 3A, figure 11-5): where its local APIC is, and whether it is
// CPU 0.
u64 apic_base_of(u32 id) {
    return 0xfee0'0800 | (id == 0 ? bit(8) : 0);
}

bool for_system_calls(u32 msr) {
    return (msr >= 0xc000'0081 && msr <= 0xc000'0084) || msr == 0xc000'0102 ||
           (msr >= 0x174 && msr <= 0x176);
}

// A vCPU that runs nothing but a program: nobody asks what it was before, and each ioctl of a vCPU
// costs several microseconds where KVM runs below another hypervisor.
void write_bare(KvmVcpu& vcpu, const Access& access, const CpuState& state) {
    Parts parts;
    parts.sregs.apic_base = apic_base_of(vcpu.id());
    parts.xcrs.nr_xcrs = access.has_xcrs();
    parts.xsave.resize(access.xsave_size());
    for (const MsrPlace& place : access.places()) {
        if (for_system_calls(place.index)) parts.msrs.push_back({.index = place.index});
    }
    to_kvm(state, parts.events);
    to_kvm(state, parts.regs);
    to_kvm(state, parts.sregs);
    to_kvm(state, parts.xcrs);
    to_kvm(state.fpu, access.policy().features.has(Feature::kAvx), parts.xsave);
    to_kvm(state, parts.debug);
    for (kvm_msr_entry& entry : parts.msrs) {
        const auto& places = access.places();
        const auto place = std::find_if(places.begin(), places.end(), [&](const MsrPlace& one) {
            return one.index == entry.index;
        });
        entry.data = place->get(state.msr);
    }
    Parts before;  // a new one has other control registers, and nothing to forget
    if (!vcpu.fresh()) before.sregs = parts.sregs;
    Refusal refusal;
    if (access.write(parts, before, refusal)) return;
    if (refusal.error != EINVAL) throw_ioctl(refusal.request, refusal.error);
    refused(vcpu, access, state, refusal);
}

}  // namespace

CpuState read_cpu(const KvmVcpu& vcpu) {
    const Access access(vcpu);
    const Parts parts = access.read();
    CpuState state;
    if (!vcpu.user_lapic()) from_kvm(parts.activity, state);
    from_kvm(parts.events, state);
    from_kvm(parts.regs, state);
    from_kvm(parts.sregs, state);
    from_kvm(parts.xcrs, state);
    from_kvm(parts.xsave, state.fpu);
    from_kvm(parts.debug, state);
    auto entry = parts.msrs.begin();
    for (const MsrPlace& place : access.places()) {
        if (entry == parts.msrs.end() || entry->index != place.index) continue;
        place.set(state.msr, entry++->data);
    }
    return state;
}

void write_cpu(KvmVcpu& vcpu, const CpuState& state) {
    const Access access(vcpu);
    validate(state, access.policy());
    if (vcpu.vm().bare()) return write_bare(vcpu, access, state);
    const Parts before = access.read();
    Parts wanted = before;
    convert(vcpu, access, state, wanted);
    Refusal refusal;
    const char* field = nullptr;
    if (access.write(wanted, before, refusal)) {
        field = lost(access.read_mode(), state);
        if (field == nullptr) return;
    }
    Refusal second;
    if (!access.write(before, wanted, second)) throw_ioctl(second.request, second.error);
    if (field != nullptr) {
        throw StateError(field, of_vcpu(vcpu) + "this host's KVM has no such mode (CR0 " +
                                    hex(state.cr0) + ", CR4 " + hex(state.cr4) + ", EFER " +
                                    hex(state.msr.efer) + ", RFLAGS " + hex(state.rflags) + "): " +
                                    field + " does not stay as it is set; use engine soft.");
    }
    if (refusal.error != EINVAL) throw_ioctl(refusal.request, refusal.error);
    refused(vcpu, access, state, refusal);
}

FpuState read_fpu(const KvmVcpu& vcpu) {
    FpuState fpu;
    from_kvm(read_xsave(vcpu), fpu);
    return fpu;
}

void write_fpu(KvmVcpu& vcpu, const FpuState& fpu) {
    std::vector<u8> xsave(vcpu.xsave_size());
    to_kvm(fpu, vcpu.vm().config().cpuid.features.has(Feature::kAvx), xsave);
    call_ioctl(vcpu.fd(), KVM_SET_XSAVE, xsave.data());
}

}  // namespace polyvisor::kvm
