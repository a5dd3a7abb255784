#include "process/image.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "base/error.hpp"

namespace polyvisor::process {

KernelImage::KernelImage(Kernel& kernel) : config_(kernel.config()), tree_(kernel.tree()) {
    Thread& thread = kernel.first_thread();
    std::lock_guard lock(kernel.mutex());
    if (kernel.threads() != 1 || kernel.processes().size() != 1) {
        throw StateMismatch(
            "only a program with one process and one thread can be copied; stop it before it "
            "starts others");
    }
    Process& process = thread.process();
    const CpuState cpu = thread.vcpu().save();
    vm_ = process.vm->freeze();
    fpu_ = cpu.fpu;
    fs_ = process.vm->supervisor().base(thread.cpu, kFs);
    gs_ = process.vm->supervisor().base(thread.cpu, kGs);
    registers_ = thread.registers;
    signals_ = thread.signals;
    title_ = thread.title;
    clear_child_tid_ = thread.clear_child_tid;
    robust_list_ = thread.robust_list;
    directory_ = process.directory;
    executable_ = process.executable;
    base_ = process.base;
    umask_ = process.umask;
    arguments_ = process.arguments;
    process_signals_ = process.signals;
    timers_ = process.timers.save();
    for (u64 number = 0; number < process.descriptors.size(); ++number) {
        const auto* entry = process.descriptors.find(number);
        if (entry == nullptr) continue;
        auto known = std::find_if(files_.begin(), files_.end(),
                                  [&](const File& file) { return file.file == entry->file; });
        if (known == files_.end()) {
            File file{entry->file};
            struct stat about{};
            if (::fstat(entry->file->fd.get(), &about) == 0 && S_ISREG(about.st_mode)) {
                file.position = ::lseek(entry->file->fd.get(), 0, SEEK_CUR);
            }
            for (int n = 0; n < 3; ++n) {
                if (kernel.standard_files[n] == entry->file) file.standard = n;
            }
            known = files_.insert(files_.end(), std::move(file));
        }
        slots_.push_back(
            {static_cast<std::size_t>(known - files_.begin()), number, entry->close_on_exec});
    }
}

std::shared_ptr<Vm> KernelImage::take_machine() const {
    {
        std::lock_guard lock(mutex_);
        if (!idle_.empty()) {
            auto machine = std::move(idle_.back());
            idle_.pop_back();
            return machine;
        }
    }
    return std::make_shared<Vm>(config_.vm, vm_);
}

void KernelImage::give_back(std::shared_ptr<Vm> machine) const {
    constexpr std::size_t kMostIdle = 8;
    try {
        machine->reset();
    } catch (const Error&) {
        return;
    }
    std::lock_guard lock(mutex_);
    if (idle_.size() < kMostIdle) idle_.push_back(std::move(machine));
}

void KernelImage::restore(Thread& thread,
                          const std::array<std::shared_ptr<OpenFile>, 3>& standard) const {
    Process& process = thread.process();
    process.vm->prepare(thread.cpu, fpu_, fs_, gs_);
    process.directory = directory_;
    process.executable = executable_;
    process.base = base_;
    process.umask = umask_;
    process.arguments = arguments_;
    process.signals = process_signals_;
    process.timers.restore(timers_);
    thread.registers = registers_;
    thread.signals = signals_;
    thread.title = title_;
    thread.clear_child_tid = clear_child_tid_;
    thread.robust_list = robust_list_;
    std::vector<std::shared_ptr<OpenFile>> files;
    for (const File& file : files_) {
        files.push_back(file.standard >= 0 ? standard[static_cast<std::size_t>(file.standard)]
                                           : reopened(file));
    }
    process.descriptors.clear();
    for (const Slot& slot : slots_) {
        if (files[slot.file]) {
            process.descriptors.place(slot.number, files[slot.file], slot.close_on_exec);
        }
    }
}

// The same file with a position of its own; what has none is shared.
std::shared_ptr<OpenFile> KernelImage::reopened(const File& file) const {
    if (file.position < 0) return file.file;
    const int fd = file.file->fd.get();
    const std::string name = "/proc/self/fd/" + std::to_string(fd);
    const int flags = ::fcntl(fd, F_GETFL) & (O_ACCMODE | O_APPEND | O_NONBLOCK);
    OwnedFd again(::open(name.c_str(), flags | O_CLOEXEC | O_NOCTTY));
    if (!again) throw_errno("cannot open a file again for the copy of a program");
    ::lseek(again.get(), file.position, SEEK_SET);
    auto made = std::make_shared<OpenFile>();
    made->fd = std::move(again);
    made->path = file.file->path;
    made->writable = file.file->writable;
    made->stored = file.file->stored;
    return made;
}

}  // namespace polyvisor::process
