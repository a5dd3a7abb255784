#include "kvm/system.hpp"

#include <cpuid.h>
#include <fcntl.h>
#include <grp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "base/mapping.hpp"
#include "kvm/ioctl.hpp"

namespace polyvisor::kvm {

namespace {

constexpr const char* kName = "kvm";
constexpr const char* kTurnOn =
    "turn virtualization on in the firmware (or nested virtualization in the hypervisor around "
    "this host) and load kvm_intel or kvm_amd";

[[noreturn]] void unavailable(const char* reason, const std::string& message) {
    throw EngineUnavailable(kName, reason, message);
}

std::string group_name(gid_t gid) {
    group entry{};
    group* found = nullptr;
    std::array<char, 4096> text;
    if (::getgrgid_r(gid, &entry, text.data(), text.size(), &found) == 0 && found != nullptr) {
        return found->gr_name;
    }
    return std::to_string(gid);
}

// What a user who may not open `path` can do about it: join the group that may, if there is one.
[[noreturn]] void no_permission(const std::string& path) {
    struct stat info{};
    bool known = ::stat(path.c_str(), &info) == 0;
    if (known && (info.st_mode & 0060) == 0060 && info.st_gid != 0) {
        std::string group = group_name(info.st_gid);
        unavailable("permission", path + " may be opened by members of group " + group +
                                      " only, and this user is none; run sudo usermod -aG " +
                                      group + " $USER and log in again");
    }
    unavailable("permission", path + " may not be opened by this user" +
                                  (known ? ", nor by any group" : "") +
                                  "; as root, run chgrp kvm " + path + " && chmod 660 " + path);
}

OwnedFd open_device(const std::string& path) {
    int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (fd >= 0) return OwnedFd(fd);
    switch (errno) {
        case ENOENT:
        case ENOTDIR:
            unavailable("missing", "there is no " + path + "; " + kTurnOn +
                                       ", or pass the device to this container");
        case ENXIO:
        case ENODEV:
            unavailable("missing", path + " is there, but no driver behind it; " + kTurnOn);
        case EACCES:
        case EPERM:
            no_permission(path);
        default:
            unavailable("broken", path + " cannot be opened: " + std::strerror(errno));
    }
}

std::vector<kvm_cpuid_entry2> read_cpuid(int fd) {
    for (u32 room = 128;; room *= 2) {
        WithEntries<kvm_cpuid2> list(room);
        list->nent = room;
        int result = try_ioctl(fd, KVM_GET_SUPPORTED_CPUID, list.head());
        if (result == -E2BIG && room < 1 << 16) continue;
        if (result < 0) throw_ioctl(KVM_GET_SUPPORTED_CPUID, -result);
        return {list->entries, list->entries + list->nent};
    }
}

std::vector<u32> read_msrs(int fd) {
    for (u32 room = 512;; room *= 2) {
        std::vector<u32> msrs(1 + room);  // struct kvm_msr_list: how many, then they
        msrs[0] = room;
        int result = try_ioctl(fd, KVM_GET_MSR_INDEX_LIST, msrs.data());
        if (result == -E2BIG && room < 1 << 16) continue;
        if (result < 0) throw_ioctl(KVM_GET_MSR_INDEX_LIST, -result);
        msrs.resize(1 + msrs[0]);
        msrs.erase(msrs.begin());
        std::sort(msrs.begin(), msrs.end());
        return msrs;
    }
}

// As KVM's module for the host's CPU tells; a KVM that has no such module has shadows.
bool has_nested_paging() {
    for (const char* path :
         {"/sys/module/kvm_intel/parameters/ept", "/sys/module/kvm_amd/parameters/npt"}) {
        const OwnedFd file(::open(path, O_RDONLY | O_CLOEXEC));
        char answer = 0;
        if (file && ::read(file.get(), &answer, 1) == 1 && (answer == 'Y' || answer == '1')) {
            return true;
        }
    }
    return false;
}

bool below_a_hypervisor() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c >> 31;
}

/// Sets XCR0 to 3 in a guest and asks KVM what it is.
bool try_xsetbv(const System& system, int vm) {
    // xor ecx, ecx; xor edx, edx; mov eax, 3; xsetbv; hlt (in 16-bit code)
    constexpr u8 kCode[] = {0x66, 0x31, 0xc9, 0x66, 0x31, 0xd2, 0x66, 0xb8,
                            3,    0,    0,    0,    0x0f, 0x01, 0xd1, 0xf4};
    constexpr u64 kOsxsave = bit(18), kPage = 4096;
    Mapping memory(-1, 0, kPage);
    std::memcpy(memory.data(), kCode, sizeof kCode);
    kvm_userspace_memory_region slot{};
    slot.memory_size = kPage;
    slot.userspace_addr = reinterpret_cast<u64>(memory.data());
    call_ioctl(vm, KVM_SET_TSS_ADDR, 0xfeff'd000L);
    call_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot);
    OwnedFd vcpu(call_ioctl(vm, KVM_CREATE_VCPU, 0L));
    Mapping shared(vcpu.get(), 0, system.vcpu_mmap_size());

    const auto& leaves = system.supported_cpuid();
    WithEntries<kvm_cpuid2> cpuid(leaves.size());
    cpuid->nent = static_cast<u32>(leaves.size());
    std::copy(leaves.begin(), leaves.end(), cpuid->entries);
    call_ioctl(vcpu.get(), KVM_SET_CPUID2, cpuid.head());
    kvm_sregs sregs{};
    call_ioctl(vcpu.get(), KVM_GET_SREGS, &sregs);
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    sregs.cr4 |= kOsxsave;
    call_ioctl(vcpu.get(), KVM_SET_SREGS, &sregs);
    kvm_regs regs{};
    regs.rflags = 2;
    call_ioctl(vcpu.get(), KVM_SET_REGS, &regs);
    // Without interrupt chips HLT comes to us; anything else is a guest that went astray.
    if (try_ioctl(vcpu.get(), KVM_RUN, 0L) < 0) return false;
    if (reinterpret_cast<kvm_run*>(shared.data())->exit_reason != KVM_EXIT_HLT) return false;
    kvm_xcrs xcrs{};
    call_ioctl(vcpu.get(), KVM_GET_XCRS, &xcrs);
    return xcrs.nr_xcrs == 1 && xcrs.xcrs[0].value == 3;
}

}  // namespace

System::System(std::string path) : path_(std::move(path)), fd_(open_device(path_)) {
    int version = try_ioctl(fd(), KVM_GET_API_VERSION);
    if (version < 0) {
        unavailable("broken", path_ + " is not KVM's device: it does not tell its API version (" +
                                  std::strerror(-version) + "); remove what is there instead");
    }
    if (version != KVM_API_VERSION) {
        unavailable("version", path_ + " has API version " + std::to_string(version) +
                                   ", and only " + std::to_string(KVM_API_VERSION) +
                                   " is known; use a Linux kernel since 2.6.22");
    }
    nested_paging_ = has_nested_paging();
    try {
        vcpu_mmap_size_ = static_cast<u64>(call_ioctl(fd(), KVM_GET_VCPU_MMAP_SIZE));
        cpuid_ = read_cpuid(fd());
        msrs_ = read_msrs(fd());
    } catch (const HostError& error) {
        unavailable("broken", path_ + " does not answer as KVM does: " + error.what() +
                                  "; look into the host's kernel log");
    }
    if (vcpu_mmap_size_ < sizeof(kvm_run) || cpuid_.empty()) {
        unavailable("broken", path_ + " does not answer as KVM does: vCPUs of " +
                                  std::to_string(vcpu_mmap_size_) + " bytes, " +
                                  std::to_string(cpuid_.size()) +
                                  " CPUID leaves; look into the host's kernel log");
    }
}

int System::check(int capability) const {
    int result = try_ioctl(fd(), KVM_CHECK_EXTENSION, static_cast<long>(capability));
    return std::max(result, 0);
}

u32 System::supported(u32 leaf, u32 subleaf, unsigned reg) const {
    for (const kvm_cpuid_entry2& entry : cpuid_) {
        if (entry.function != leaf || entry.index != subleaf) continue;
        return std::array{entry.eax, entry.ebx, entry.ecx, entry.edx}[reg];
    }
    return 0;
}

bool System::has_msr(u32 index) const {
    return std::binary_search(msrs_.begin(), msrs_.end(), index);
}

u64 System::feature_msr(u32 index) const {
    if (check(KVM_CAP_GET_MSR_FEATURES) == 0) return 0;
    WithEntries<kvm_msrs> list(1);
    list->nmsrs = 1;
    list->entries[0].index = index;
    return try_ioctl(fd(), KVM_GET_MSRS, list.head()) == 1 ? list->entries[0].data : 0;
}

OwnedFd System::new_vm() const {
    int vm = try_ioctl(fd(), KVM_CREATE_VM, 0L);
    if (vm >= 0) return OwnedFd(vm);
    if (vm == -EBUSY) {
        unavailable("busy",
                    "another hypervisor, such as VirtualBox or VMware, has taken this "
                    "host's virtualization; end its machines first");
    }
    if (vm == -EMFILE || vm == -ENFILE || vm == -ENOMEM) throw_ioctl(KVM_CREATE_VM, -vm);
    unavailable("broken", path_ + " opens, but makes no virtual machine: " + std::strerror(-vm) +
                              "; look into the host's kernel log");
}

OwnedFd System::take_vm() const {
    OwnedFd spare = std::move(spare_);
    // The kernel binds a VM to the process that made it.
    return spare && spare_pid_ == ::getpid() ? std::move(spare) : new_vm();
}

OwnedFd System::create_vm() const {
    std::lock_guard lock(mutex_);
    return take_vm();
}

u64 System::tsc_khz() const {
    std::lock_guard lock(mutex_);
    if (tsc_khz_ != 0) return tsc_khz_;
    OwnedFd vm = new_vm();
    int khz = try_ioctl(vm.get(), KVM_GET_TSC_KHZ);
    if (khz > 0) {
        spare_ = std::move(vm);  // nothing was done with it
        spare_pid_ = ::getpid();
    } else {
        // Kernels before 5.17 tell only vCPUs.
        OwnedFd vcpu(call_ioctl(vm.get(), KVM_CREATE_VCPU, 0L));
        khz = call_ioctl(vcpu.get(), KVM_GET_TSC_KHZ);
    }
    return tsc_khz_ = static_cast<u64>(khz);
}

void System::note_vcpu_without_lapic() const {
    std::lock_guard lock(mutex_);
    if (kept_vcpu_ || !std::exchange(had_vcpu_, true)) return;
    const int vm = try_ioctl(fd(), KVM_CREATE_VM, 0L);
    if (vm < 0) return;  // nothing is lost but time
    kept_vm_ = OwnedFd(vm);
    const int vcpu = try_ioctl(vm, KVM_CREATE_VCPU, 0L);
    if (vcpu >= 0) kept_vcpu_ = OwnedFd(vcpu);
}

bool System::tsc_offset_works(int vcpu_fd) const {
    std::lock_guard lock(mutex_);
    if (tsc_offset_works_ >= 0) return tsc_offset_works_ != 0;
    s64 offset = -1'000'000;
    kvm_device_attr attribute{};
    attribute.group = KVM_VCPU_TSC_CTRL;
    attribute.attr = KVM_VCPU_TSC_OFFSET;
    attribute.addr = reinterpret_cast<u64>(&offset);
    bool works = try_ioctl(vcpu_fd, KVM_SET_DEVICE_ATTR, &attribute) == 0;
    const s64 given = std::exchange(offset, 0);
    works = works && try_ioctl(vcpu_fd, KVM_GET_DEVICE_ATTR, &attribute) == 0 && offset == given;
    tsc_offset_works_ = works;
    return works;
}

bool System::xsetbv_works() const {
    if (!below_a_hypervisor()) return true;
    std::lock_guard lock(mutex_);
    if (xsetbv_ < 0) xsetbv_ = try_xsetbv(*this, take_vm().get());
    return xsetbv_ != 0;
}

}  // namespace polyvisor::kvm
