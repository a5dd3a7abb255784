#include "kvm/msrs.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "kvm/ioctl.hpp"

namespace polyvisor::kvm {

namespace {

/// Which vCPUs have an MSR.
enum class Needs : u8 {
    kListed,  ///< KVM's list (KVM_GET_MSR_INDEX_LIST) has it
    kMtrr,    ///< the list has never had them; the policy's feature
    kXsaves,  ///< in the list only of newer kernels; the policy's feature
    kClock,   ///< the KVM clock, listed and in the policy
};

struct Row {
    u32 index;
    u32 word;
    const char* field;
    Needs needs;
};

#define PV_WORD(member) static_cast<u32>(offsetof(MsrState, member) / sizeof(u64))
static_assert(sizeof(MsrState) % sizeof(u64) == 0 && offsetof(MsrState, mtrr_variable) % 8 == 0);

constexpr Row kRows[] = {
    {0xc0000081, PV_WORD(star), "msr.star", Needs::kListed},
    {0xc0000082, PV_WORD(lstar), "msr.lstar", Needs::kListed},
    {0xc0000083, PV_WORD(cstar), "msr.cstar", Needs::kListed},
    {0xc0000084, PV_WORD(sfmask), "msr.sfmask", Needs::kListed},
    {0xc0000102, PV_WORD(kernel_gs_base), "msr.kernel_gs_base", Needs::kListed},
    {0xc0000103, PV_WORD(tsc_aux), "msr.tsc_aux", Needs::kListed},
    {0x174, PV_WORD(sysenter_cs), "msr.sysenter_cs", Needs::kListed},
    {0x175, PV_WORD(sysenter_esp), "msr.sysenter_esp", Needs::kListed},
    {0x176, PV_WORD(sysenter_eip), "msr.sysenter_eip", Needs::kListed},
    {0x277, PV_WORD(pat), "msr.pat", Needs::kListed},
    {0x3b, PV_WORD(tsc_adjust), "msr.tsc_adjust", Needs::kListed},
    {0x1a0, PV_WORD(misc_enable), "msr.misc_enable", Needs::kListed},
    {0x48, PV_WORD(spec_ctrl), "msr.spec_ctrl", Needs::kListed},
    {0xda0, PV_WORD(xss), "msr.xss", Needs::kXsaves},
    {kKvmWallClockMsr, PV_WORD(kvm_wall_clock), "msr.kvm_wall_clock", Needs::kClock},
    {kKvmWallClockMsr + 1, PV_WORD(kvm_system_time), "msr.kvm_system_time", Needs::kClock},
    {0x2ff, PV_WORD(mtrr_def_type), "msr.mtrr_def_type", Needs::kMtrr},
    {0x250, PV_WORD(mtrr_fixed) + 0, "msr.mtrr_fixed", Needs::kMtrr},
    {0x258, PV_WORD(mtrr_fixed) + 1, "msr.mtrr_fixed", Needs::kMtrr},
    {0x259, PV_WORD(mtrr_fixed) + 2, "msr.mtrr_fixed", Needs::kMtrr},
};
constexpr u32 kFixed4k = 0x268, kFixed4kCount = 8, kFixed4kFirst = 3, kVariable = 0x200;

bool offered(Needs needs, u32 index, const System& system, const CpuidPolicy& policy) {
    switch (needs) {
        case Needs::kListed:
            return system.has_msr(index);
        case Needs::kMtrr:
            return policy.features.has(Feature::kMtrr);
        case Needs::kXsaves:
            return policy.features.has(Feature::kXsaves);
        case Needs::kClock:
            return system.has_msr(index) && policy.features.has(Feature::kKvmClock);
    }
    return false;
}

}  // namespace

u64 MsrPlace::get(const MsrState& msr) const {
    u64 value;
    std::memcpy(&value, reinterpret_cast<const u8*>(&msr) + word * sizeof value, sizeof value);
    return value;
}

void MsrPlace::set(MsrState& msr, u64 value) const {
    std::memcpy(reinterpret_cast<u8*>(&msr) + word * sizeof value, &value, sizeof value);
}

std::vector<MsrPlace> msr_places(const System& system, const CpuidPolicy& policy) {
    std::vector<MsrPlace> places;
    for (const Row& row : kRows) {
        if (offered(row.needs, row.index, system, policy)) {
            places.push_back({row.index, row.word, row.field});
        }
    }
    if (policy.features.has(Feature::kMtrr)) {
        for (u32 n = 0; n < kFixed4kCount; ++n) {
            places.push_back(
                {kFixed4k + n, PV_WORD(mtrr_fixed) + kFixed4kFirst + n, "msr.mtrr_fixed"});
        }
        for (u32 n = 0; n < MsrState{}.mtrr_variable.size(); ++n) {
            places.push_back({kVariable + n, PV_WORD(mtrr_variable) + n, "msr.mtrr_variable"});
        }
    }
    return places;
}

std::vector<kvm_msr_entry> read_msrs(int vcpu_fd, std::span<const MsrPlace> places) {
    std::vector<kvm_msr_entry> entries;
    // KVM stops at the first that it refuses and tells how many it read.
    while (!places.empty()) {
        WithEntries<kvm_msrs> msrs(places.size());
        msrs->nmsrs = static_cast<u32>(places.size());
        for (std::size_t n = 0; n < places.size(); ++n) msrs->entries[n].index = places[n].index;
        auto count = static_cast<std::size_t>(call_ioctl(vcpu_fd, KVM_GET_MSRS, msrs.head()));
        count = std::min(count, places.size());
        entries.insert(entries.end(), msrs->entries, msrs->entries + count);
        places = places.subspan(std::min(count + 1, places.size()));
    }
    return entries;
}

std::size_t write_msrs(int vcpu_fd, std::span<const kvm_msr_entry> entries) {
    WithEntries<kvm_msrs> msrs(entries.size());
    msrs->nmsrs = static_cast<u32>(entries.size());
    std::copy(entries.begin(), entries.end(), msrs->entries);
    return static_cast<std::size_t>(call_ioctl(vcpu_fd, KVM_SET_MSRS, msrs.head()));
}

}  // namespace polyvisor::kvm
