// A program that stands still, as a value: what copies of it are made from, and reset to.
#pragma once

#include <memory>
#include <vector>

#include "process/thread.hpp"

namespace polyvisor::process {

/// Immutable but for the machines that it keeps, and independent of the process VM that it was
/// taken of.
class KernelImage {
  public:
    /// Of a process VM with one process and one thread, which stands between two instructions of
    /// the program. Throws StateMismatch, HostError.
    explicit KernelImage(Kernel& kernel);

    const KernelConfig& config() const { return config_; }
    const Tree& tree() const { return tree_; }
    const std::shared_ptr<const VmImage>& vm() const { return vm_; }
    /// A machine with this memory: one that was given back, or a new one. Throws HostError.
    std::shared_ptr<Vm> take_machine() const;
    /// Nobody uses it any more; it is kept for the next copy, since making and closing one takes
    /// longer than to reset it.
    void give_back(std::shared_ptr<Vm> machine) const;
    /// Puts a process and its thread into this state, but for their memory. `standard`: the files
    /// in the place of its standard input, output and error.
    void restore(Thread& thread, const std::array<std::shared_ptr<OpenFile>, 3>& standard) const;

  private:
    struct File {
        std::shared_ptr<OpenFile> file;
        s64 position = -1;  ///< of a regular file; else there is none
        int standard = -1;
    };
    struct Slot {
        std::size_t file;  // index in files_
        u64 number;
        bool close_on_exec;
    };
    std::shared_ptr<OpenFile> reopened(const File& file) const;

    KernelConfig config_;
    Tree tree_;
    std::shared_ptr<const VmImage> vm_;
    FpuState fpu_;
    u64 fs_ = 0, gs_ = 0;
    GeneralRegisters registers_;
    ThreadSignals signals_;
    Timers::Saved timers_;
    std::string title_;
    u64 clear_child_tid_ = 0, robust_list_ = 0;
    std::string directory_, executable_;
    u64 base_ = 0;
    u32 umask_ = 0;
    std::vector<std::string> arguments_;
    ProcessSignals process_signals_;
    std::vector<File> files_;
    std::vector<Slot> slots_;
    mutable std::mutex mutex_;  // a leaf
    mutable std::vector<std::shared_ptr<Vm>> idle_;
};

}  // namespace polyvisor::process
