// KVM's binary statistics (virt/kvm/api: KVM_GET_STATS_FD) of a VM or vCPU by name.
#pragma once

#include <vector>

#include "cpu/engine.hpp"

namespace polyvisor::kvm {

/// `fd`: of a VM or vCPU. Empty on kernels without them (before 5.14). Histograms become one
/// counter per bucket ("halt_wait_hist[3]").
std::vector<Vcpu::Counter> read_stats(int fd);

}  // namespace polyvisor::kvm
