#include "kvm/vm.hpp"

#include <unistd.h>

#include "kvm/bus_hooks.hpp"
#include "kvm/chips.hpp"
#include "kvm/dirty_log.hpp"
#include "kvm/ioctl.hpp"
#include "kvm/msr_filter.hpp"

namespace polyvisor::kvm {

namespace {

// Four pages that Intel's VMX needs of guest-physical memory: between the PC's chips and its
// firmware, where it has neither memory nor devices.
constexpr u64 kIdentityMap = 0xfeff'c000;
constexpr u64 kTss = kIdentityMap + kPageSize;

}  // namespace

Vm::Vm(std::shared_ptr<const System> system, const EngineConfig& config)
    : system_(std::move(system)), config_(config), pid_(::getpid()), fd_(system_->create_vm()) {
    int most = check(KVM_CAP_MAX_VCPUS);
    if (config_.cpus > static_cast<u32>(most)) {
        throw ConfigError("cpus", "this host's KVM runs at most " + std::to_string(most) +
                                      " CPUs in a machine, not " + std::to_string(config_.cpus));
    }
    vcpus_.resize(config_.cpus);
    u64 identity_map = kIdentityMap;
    call_ioctl(fd(), KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
    call_ioctl(fd(), KVM_SET_TSS_ADDR, kTss);
    memslots_ = std::make_unique<Memslots>(fd(), config_.memory,
                                           static_cast<unsigned>(check(KVM_CAP_NR_MEMSLOTS)));
    clock_ = std::make_unique<GuestClock>(fd(), config_.clock);
    if (config_.irqchip != IrqchipMode::kUser) chips_ = std::make_unique<Chips>(*this);
    if (!bare()) install_msr_filter(*this);
    dirty_log_ = std::make_unique<KvmDirtyLog>(*this);
    hooks_ = std::make_unique<BusHooks>(*this);
}

Vm::~Vm() = default;

int Vm::check(int capability) const {
    int result = try_ioctl(fd(), KVM_CHECK_EXTENSION, static_cast<long>(capability));
    return result < 0 ? 0 : result;
}

OwnedFd Vm::create_vcpu(u32 id) const {
    if (id >= vcpus_.size()) {
        throw ConfigError("id", "there is no CPU " + std::to_string(id) + " in a machine of " +
                                    std::to_string(vcpus_.size()));
    }
    int fd = try_ioctl(this->fd(), KVM_CREATE_VCPU, static_cast<unsigned long>(id));
    if (fd == -EEXIST) {
        throw StateMismatch("CPU " + std::to_string(id) +
                            " was made already; KVM makes each once in the life of a machine");
    }
    if (fd < 0) throw_ioctl(KVM_CREATE_VCPU, -fd);
    if (irqchip() == IrqchipMode::kUser) system_->note_vcpu_without_lapic();
    return OwnedFd(fd);
}

void Vm::register_vcpu(u32 id, KvmVcpu* vcpu) {
    vcpus_[id] = vcpu;
}

void Vm::check_process() const {
    if (::getpid() == pid_) return;
    throw StateMismatch(
        "this machine belongs to the process that made it; a forked child cannot run it, make a "
        "new machine there");
}

}  // namespace polyvisor::kvm
