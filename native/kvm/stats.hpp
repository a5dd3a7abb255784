// KVM's binary statistics of a VM or vCPU (KVM_GET_STATS_FD, Linux 5.14). The kernel describes them
// itself: name, kind, unit and where the values are; nothing here knows a name.
#pragma once

#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "cpu/engine.hpp"
#include "cpu/statistic.hpp"

namespace polyvisor::kvm {

/// An open statistics file. It may be read by any thread at any time, also while the vCPU runs, but
/// has to be opened while it does not: the ioctl waits for the vCPU.
class StatsFile {
  public:
    /// `fd`: of a VM or vCPU. A kernel without statistics gives an empty one; also when the process
    /// has no file descriptor to spare, for statistics are never worth a failure.
    explicit StatsFile(int fd);
    /// For tests: a file in the kernel's format.
    explicit StatsFile(OwnedFd file) : file_(std::move(file)) {}

    bool available() const { return static_cast<bool>(file_); }
    /// The present values in the kernel's order; empty when unavailable, or when the file is not of
    /// the known format.
    std::vector<Statistic> read() const;

  private:
    bool describe() const;

    struct Place {
        u64 index;  // in the data block
        u64 count;
    };
    OwnedFd file_;
    mutable std::mutex mutex_;  // a leaf
    mutable bool described_ = false;
    mutable std::vector<Statistic> stats_;  // without values
    mutable std::vector<Place> places_;     // of their values
    mutable u64 data_offset_ = 0;           // in the file
    mutable u64 data_size_ = 0;             // values
};

/// As plain counters. Histograms become one counter per bucket ("halt_wait_hist[3]").
std::vector<Vcpu::Counter> to_counters(std::span<const Statistic> stats);
/// Opens, reads and closes.
std::vector<Vcpu::Counter> read_stats(int fd);

}  // namespace polyvisor::kvm
