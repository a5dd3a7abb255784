#include "process/lost_pages.hpp"

#include <signal.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <mutex>

namespace polyvisor::process {

namespace {

// The handler reads it while others change it; a slot whose end is nothing is free.
struct Slot {
    std::atomic<u8*> start{nullptr}, end{nullptr};
    std::atomic<bool> lost{false};
};
constinit std::array<Slot, 8192> slots;
constinit std::atomic<std::size_t> slots_used{0};  // none from here on was ever in use
constinit std::mutex changing;
struct sigaction before;  // ours
constinit std::atomic<bool> passed_on{false};

// The signal is not for us: whoever had it before has it, or nobody when that was tried already
// (two that give way to each other would do so forever).
void pass_on(const siginfo_t& info) {
    struct sigaction next{};
    next.sa_handler = SIG_DFL;
    if (!passed_on.exchange(true)) next = before;
    ::sigaction(SIGBUS, &next, nullptr);
    if (info.si_code <= 0) ::raise(SIGBUS);  // sent by somebody; else the access is repeated
}

// All that is behind a page of a mapping that the file does not have is not there, either. (A range
// that is being changed may reach too far: then it is the same program that loses more.)
void on_bus_error(int, siginfo_t* info, void*) {
    const int error = errno;
    auto* const at =
        reinterpret_cast<u8*>(align_down(reinterpret_cast<u64>(info->si_addr), kPageSize));
    for (std::size_t n = 0; info->si_code == BUS_ADRERR && n < slots_used; ++n) {
        Slot& slot = slots[n];
        u8 *const end = slot.end, *const start = slot.start;
        if (end == nullptr || at < start || at >= end) continue;
        if (::mmap(at, static_cast<std::size_t>(end - at), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED) {
            break;
        }
        slot.lost = true;
        errno = error;
        return;
    }
    pass_on(*info);
    errno = error;
}

void install() {
    struct sigaction now{};
    ::sigaction(SIGBUS, nullptr, &now);
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus_error) return;
    before = now;
    passed_on = false;
    struct sigaction ours{};
    ours.sa_sigaction = on_bus_error;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    ::sigemptyset(&ours.sa_mask);
    ::sigaction(SIGBUS, &ours, nullptr);
}

}  // namespace

// What was watched stays so until the new ranges are.
bool LostPages::watch(std::span<const Range> ranges) {
    if (ranges.empty() && slots_.empty()) return true;
    std::lock_guard lock(changing);
    std::vector<std::size_t> taken;
    for (std::size_t n = 0; n < slots.size() && taken.size() < ranges.size(); ++n) {
        if (slots[n].end == nullptr) taken.push_back(n);
    }
    if (taken.size() < ranges.size()) return false;
    bool lost = false;
    for (const std::size_t n : slots_) lost |= slots[n].lost;
    for (std::size_t n = 0; n < taken.size(); ++n) {
        Slot& slot = slots[taken[n]];
        slot.lost = lost;
        slot.start = ranges[n].first;
        slot.end = ranges[n].second;
        if (slots_used <= taken[n]) slots_used = taken[n] + 1;
    }
    if (!ranges.empty()) install();
    for (const std::size_t n : slots_) {
        slots[n].end = nullptr;
        slots[n].lost = false;
    }
    slots_ = std::move(taken);
    return true;
}

bool LostPages::take() {
    bool lost = false;
    for (const std::size_t n : slots_) lost |= slots[n].lost.exchange(false);
    return lost;
}

}  // namespace polyvisor::process
