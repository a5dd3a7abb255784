#include "process/arena.hpp"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "base/error.hpp"
#include "process/pagemap.hpp"

namespace polyvisor::process {

// --- Free runs -----------------------------------------------------------------------------------

void FreeRuns::add(u64 start, u64 size) {
    auto after = runs_.lower_bound(start);
    if (after != runs_.end() && after->first == start + size) {
        size += after->second;
        after = runs_.erase(after);
    }
    if (after != runs_.begin()) {
        auto before = std::prev(after);
        if (before->first + before->second == start) {
            before->second += size;
            return;
        }
    }
    runs_.emplace_hint(after, start, size);
}

u64 FreeRuns::take_from(std::map<u64, u64>::iterator run, u64 start, u64 size) {
    const u64 end = run->first + run->second;
    if (start == run->first) {
        runs_.erase(run);
    } else {
        run->second = start - run->first;
    }
    if (end > start + size) runs_[start + size] = end - (start + size);
    return start;
}

std::optional<u64> FreeRuns::take(u64 size, std::optional<u64> near, u64 low) {
    if (near) {
        auto run = runs_.upper_bound(*near);
        if (run != runs_.begin() &&
            std::prev(run)->first + std::prev(run)->second >= *near + size) {
            return take_from(std::prev(run), *near, size);
        }
    }
    auto best = runs_.end();
    u64 best_room = ~u64{0}, best_start = 0;
    for (auto run = runs_.begin(); run != runs_.end(); ++run) {
        const u64 end = run->first + run->second;
        const u64 start = std::max(run->first, low);
        if (start < end && end - start >= size && end - start < best_room) {
            best = run, best_room = end - start, best_start = start;
        }
    }
    if (best != runs_.end()) return take_from(best, best_start, size);
    return low != 0 ? take(size) : std::nullopt;
}

// --- The arena -----------------------------------------------------------------------------------

namespace {

constexpr int kRights = PROT_READ | PROT_WRITE;

}  // namespace

Arena::Arena(GuestMemory& memory, u64 size, u64 tables)
    : memory_(memory), size_(size), tables_(tables) {
    open_pagemap();
    void* at = ::mmap(nullptr, size, kRights, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw_errno("cannot reserve the memory of a process");
    base_ = static_cast<u8*>(at);
    // It lives as long as anybody looks at the memory.
    owner_ = std::shared_ptr<void>(at, [size](void* start) { ::munmap(start, size); });
    state_ = fresh();
    back(tables);
}

// The engine is to know of all up to `end`: a few regions, each as large as those before.
void Arena::back(u64 end) {
    constexpr u64 kFirst = 32 << 20;
    if (end <= backed_) return;
    const u64 start = backed_;
    backed_ = std::min(size_, std::max({end, kFirst + tables_, 2 * backed_}));
    memory_.add_mapping(Gpa(start), Mapping::borrowed(base_ + start, backed_ - start), "process",
                        true, owner_);
    if (growth_) growth_();
}

Arena::State Arena::fresh() const {
    State state;
    state.top = tables_;
    state.free.add(tables_, size_ - tables_);
    return state;
}

std::optional<Gpa> Arena::allocate_table(u64 size) {
    if (size > tables_ - state_.tables_used) return std::nullopt;
    const Gpa gpa(state_.tables_used);
    state_.tables_used += size;
    return gpa;
}

// Behind an image if possible: to write to one of its holes takes a page of the image, too.
std::optional<Gpa> Arena::allocate(u64 size, std::optional<Gpa> near) {
    const auto start =
        state_.free.take(size, near ? std::optional(near->value) : std::nullopt, image_end());
    if (!start) return std::nullopt;
    state_.allocated += size;
    state_.top = std::max(state_.top, *start + size);
    back(state_.top);
    return Gpa(*start);
}

void Arena::free(Gpa gpa, u64 size) {
    state_.allocated -= size;
    // What cannot be made zero is not handed out again.
    if (make_zero(gpa.value, gpa.value + size)) state_.free.add(gpa.value, size);
    wrote(gpa, size);
}

void Arena::discard(Gpa gpa, u64 size) {
    if (!make_zero(gpa.value, gpa.value + size)) std::memset(host(gpa), 0, size);
    wrote(gpa, size);
}

// Also for KVM: either way the host takes the pages out of KVM's tables, so that the next access
// looks at the guest's again. False: the host has no mapping left to give.
bool Arena::make_zero(u64 start, u64 end) {
    const bool runs = has_runs(start, end);
    if (!runs && start >= image_end()) {
        return ::madvise(base_ + start, end - start, MADV_DONTNEED) == 0;
    }
    if (!runs && !may_map()) {
        (void)::madvise(base_ + start, end - start, MADV_DONTNEED);
        std::memset(base_ + start, 0, end - start);
        return true;
    }
    if (map_run(start, {end}) != 0) {
        (void)::madvise(base_ + start, end - start, MADV_DONTNEED);
        return false;
    }
    cut_runs(start, end);
    if (start < image_end()) put_run(start, {std::min(end, image_end())});
    (void)watch_runs();  // fewer than before, or a part of one more
    return true;
}

int Arena::map_run(u64 start, const Run& run) {
    const int kind = run.shared ? MAP_SHARED : MAP_PRIVATE;
    void* at = ::mmap(base_ + start, run.end - start, kRights,
                      kind | MAP_NORESERVE | MAP_FIXED | (run.file ? 0 : MAP_ANONYMOUS),
                      run.file ? run.file->get() : -1, static_cast<off_t>(run.offset));
    return at == MAP_FAILED ? errno : 0;
}

int Arena::map_file(Gpa gpa, u64 size, File file, u64 offset, bool shared) {
    Run run{gpa.value + size, std::move(file), offset, shared};
    if (int error = map_run(gpa.value, run)) return error;
    cut_runs(gpa.value, run.end);
    put_run(gpa.value, std::move(run));
    if (int error = watch_runs()) {
        (void)make_zero(gpa.value, gpa.value + size);
        return error;
    }
    wrote(gpa, size);
    return 0;
}

bool Arena::is_file(Gpa gpa) const {
    auto run = runs_.upper_bound(gpa.value);
    return run != runs_.begin() && (--run)->second.end > gpa.value && run->second.file;
}

bool Arena::has_runs(u64 start, u64 end) const {
    auto run = runs_.lower_bound(end);
    return run != runs_.begin() && std::prev(run)->second.end > start;
}

// Where there is none so far. What goes on from its neighbours is one mapping with them, as it is
// for the host.
void Arena::put_run(u64 start, Run run) {
    auto goes_on = [](u64 at, const Run& left, const Run& right) {
        return left.file == right.file && left.shared == right.shared &&
               (!left.file || left.offset + (left.end - at) == right.offset);
    };
    auto after = runs_.find(run.end);
    if (after != runs_.end() && goes_on(start, run, after->second)) {
        run.end = after->second.end;
        after = runs_.erase(after);
    }
    auto before = runs_.lower_bound(start);
    if (before != runs_.begin() && (--before)->second.end == start &&
        goes_on(before->first, before->second, run)) {
        before->second.end = run.end;
        return;
    }
    runs_[start] = std::move(run);
}

void Arena::cut_runs(u64 start, u64 end) {
    auto run = runs_.lower_bound(start);
    if (run != runs_.begin() && std::prev(run)->second.end > start) --run;
    while (run != runs_.end() && run->first < end) {
        const u64 from = run->first;
        const Run old = std::move(run->second);
        run = runs_.erase(run);
        if (from < start) runs_[from] = {start, old.file, old.offset, old.shared};
        if (old.end > end) {
            runs_[end] = {old.end, old.file, old.file ? old.offset + (end - from) : 0, old.shared};
        }
    }
}

// An errno: there is no room for so many, and those of before are watched.
int Arena::watch_runs() {
    if (!lost_) return 0;
    std::vector<LostPages::Range> ranges;
    for (const auto& [start, run] : runs_) {
        if (run.file && run.shared) ranges.emplace_back(base_ + start, base_ + run.end);
    }
    return lost_->watch(ranges) ? 0 : ENOMEM;
}

// A change of the host's rights reaches KVM, which then asks the guest's tables anew. (There is no
// way but to take some away: a CPU that writes there at this very moment may be refused by KVM. If
// the host has no mapping left for that, the guest keeps its rights to what is its own.)
void Arena::forget_rights(Gpa gpa, u64 size) const {
    if (::mprotect(host(gpa), size, PROT_READ) != 0) return;
    if (::mprotect(host(gpa), size, kRights) == 0) return;
    throw_errno("cannot change the rights of a process's memory");
}

}  // namespace polyvisor::process
