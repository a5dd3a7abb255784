// Freezing, adopting, forking and resetting of arenas.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/error.hpp"
#include "process/arena.hpp"
#include "process/pagemap.hpp"

namespace polyvisor::process {

namespace {

using Extent = GuestMemory::Extent;
using Extents = std::vector<Extent>;

// Below it what a fork would copy is copied, rather than shared.
constexpr u64 kFewBytes = 1 << 20;
// Below it reset() writes pages back, which is cheaper than to take them away and to have the
// program get them again.
constexpr u64 kFewPages = 128;

u64 bytes_of(const Extents& extents) {
    u64 bytes = 0;
    for (const Extent& extent : extents) bytes += extent.size;
    return bytes;
}

// Sorted, and none twice.
void tidy(Extents& extents) {
    std::sort(extents.begin(), extents.end(),
              [](const Extent& a, const Extent& b) { return a.offset < b.offset; });
    Extents merged;
    for (const Extent& extent : extents) {
        if (merged.empty() || merged.back().offset + merged.back().size < extent.offset) {
            merged.push_back(extent);
        } else {
            const u64 end =
                std::max(merged.back().offset + merged.back().size, extent.offset + extent.size);
            merged.back().size = end - merged.back().offset;
        }
    }
    extents = std::move(merged);
}

// What of sorted `extents` is not in one of the runs.
template <class Runs>
Extents outside(const Extents& extents, const Runs& runs) {
    Extents left;
    for (const Extent& extent : extents) {
        u64 at = extent.offset;
        const u64 end = at + extent.size;
        auto run = runs.upper_bound(at);
        if (run != runs.begin()) --run;
        for (; run != runs.end() && run->first < end; ++run) {
            if (run->second.end <= at) continue;
            if (run->first > at) left.push_back({at, run->first - at});
            at = run->second.end;
        }
        if (at < end) left.push_back({at, end - at});
    }
    return left;
}

template <class Runs>
bool holds(const Runs& runs, u64 start, const typename Runs::mapped_type& run) {
    const auto found = runs.find(start);
    return found != runs.end() && found->second == run;
}

template <class Runs>
Runs files_of(Runs runs) {
    std::erase_if(runs, [](const auto& one) { return !one.second.file; });
    return runs;
}

// The part of a file's mapping that has bytes of the file.
u64 filled(int fd, u64 offset, u64 size) {
    struct stat about{};
    if (::fstat(fd, &about) != 0 || static_cast<u64>(about.st_size) <= offset) return 0;
    return std::min(size, align_up(static_cast<u64>(about.st_size) - offset, kPageSize));
}

// From memory to the same place of a file. What is a file's and has gone meanwhile stays zero.
void write_extent(int fd, const u8* base, u64 at, u64 end) {
    while (at < end) {
        const ssize_t done = ::pwrite(fd, base + at, end - at, static_cast<off_t>(at));
        if (done > 0) {
            at += static_cast<u64>(done);
        } else if (done < 0 && errno == EFAULT) {
            at = align_down(at, kPageSize) + kPageSize;
        } else if (done == 0 || errno != EINTR) {
            throw_errno("cannot copy the memory of a process");
        }
    }
}

void read_extent(int fd, u8* to, const Extent& extent) {
    for (u64 at = extent.offset, end = at + extent.size; at < end;) {
        const ssize_t done = ::pread(fd, to, end - at, static_cast<off_t>(at));
        if (done > 0) {
            at += static_cast<u64>(done);
            to += done;
        } else if (done == 0 || errno != EINTR) {
            throw_errno("cannot read the image of a process's memory");
        }
    }
}

void check(int error) {
    if (error == 0) return;
    errno = error;
    throw_errno("cannot map the memory of a process");
}

}  // namespace

u64 Arena::image_end() const {
    return image_ ? image_->end_ : 0;
}

// Own copies of pages below `end`, in parts that were handed out, sorted.
void Arena::private_extents(u64 end, Extents& into) const {
    private_pages(base_, 0, std::min(state_.tables_used, end), into);
    private_pages(base_, tables_, std::min(state_.top, end), into);
}

std::shared_ptr<const ArenaImage> Arena::freeze(Files files) const {
    auto image = std::make_shared<ArenaImage>();
    image->size_ = size_;
    image->tables_ = tables_;
    image->state_ = state_;
    image->end_ = state_.top;
    Extents extents;
    if (image_) extents = outside(image_->extents_, runs_);
    for (const auto& [start, run] : runs_) {
        if (!run.file) continue;
        if (run.shared || files == Files::kKept) {
            image->runs_[start] = run;
        } else {
            extents.push_back({start, filled(run.file->get(), run.offset, run.end - start)});
        }
    }
    private_extents(size_, extents);
    tidy(extents);
    extents = outside(extents, image->runs_);
    image->fd_ = OwnedFd(::memfd_create("polyvisor:process", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (!image->fd_) throw_errno("cannot make an image of a process's memory");
    const int fd = image->fd_.get();
    if (::ftruncate(fd, static_cast<off_t>(image->end_)) != 0) {
        throw_errno("cannot size an image of a process's memory");
    }
    for (const Extent& extent : extents) {
        write_extent(fd, base_, extent.offset, extent.offset + extent.size);
    }
    if (::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL) != 0) {
        throw_errno("cannot seal an image of a process's memory");
    }
    image->bytes_ = bytes_of(extents);
    image->extents_ = std::move(extents);
    return image;
}

// What is below all runs: the image, and zeroes behind it.
int Arena::map_base(u64 start, u64 end) {
    const u64 middle = std::clamp(image_end(), start, end);
    if (start < middle) {
        void* at = ::mmap(base_ + start, middle - start, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, image_->fd_.get(),
                          static_cast<off_t>(start));
        if (at == MAP_FAILED) return errno;
    }
    return middle < end ? map_run(middle, {end}) : 0;
}

void Arena::adopt(std::shared_ptr<const ArenaImage> image) {
    if (image->size_ != size_ || image->tables_ != tables_) {
        throw StateMismatch("a process's memory was frozen with another size");
    }
    // Nothing was ever mapped behind it: then it need not be mapped again.
    const u64 used = runs_.empty() && !image_ ? state_.top : size_;
    image_ = std::move(image);
    check(map_base(0, std::max(image_end(), used)));
    for (const auto& [start, run] : image_->runs_) check(map_run(start, run));
    runs_ = image_->runs_;
    check(watch_runs());
    state_ = image_->state_;
    back(state_.top);
    wrote(Gpa(0), backed_);
}

void Arena::outlive_files() {
    lost_ = std::make_unique<LostPages>();
    check(watch_runs());
}

void Arena::fork(Arena& parent, bool alone) {
    Extents changed;
    parent.private_extents(parent.size_, changed);
    if (!parent.image_ || bytes_of(changed) > kFewBytes) {
        const auto image = parent.freeze(Files::kKept);
        if (alone) parent.adopt(image);
        return adopt(image);
    }
    adopt(parent.image_);
    for (const auto& [start, run] : parent.runs_) {
        if (!holds(runs_, start, run)) check(map_run(start, run));
    }
    runs_ = parent.runs_;
    check(watch_runs());
    state_ = parent.state_;
    back(state_.top);
    for (const Extent& extent : outside(changed, files_of(runs_))) {
        std::memcpy(base_ + extent.offset, parent.base_ + extent.offset, extent.size);
    }
}

void Arena::reset(Tables tables) {
    if (!image_) throw StateMismatch("a process's memory has no image to go back to");
    const Runs& wanted = image_->runs_;
    for (const auto& [start, run] : runs_) {
        if (holds(wanted, start, run)) continue;
        check(map_base(start, run.end));
        wrote(Gpa(start), run.end - start);
    }
    for (const auto& [start, run] : wanted) {
        if (holds(runs_, start, run)) continue;
        check(map_run(start, run));
        wrote(Gpa(start), run.end - start);
    }
    runs_ = wanted;
    check(watch_runs());
    const u64 end = image_end();
    if (state_.top > end) {
        (void)::madvise(base_ + end, state_.top - end, MADV_DONTNEED);
        wrote(Gpa(end), state_.top - end);
    }
    Extents changed;
    if (tables == Tables::kRestored) private_pages(base_, 0, state_.tables_used, changed);
    private_pages(base_, tables_, std::min(state_.top, end), changed);
    restore(outside(changed, files_of(runs_)));
    const u64 used = tables == Tables::kKept ? state_.tables_used : image_->state_.tables_used;
    state_ = image_->state_;
    state_.tables_used = used;
}

std::vector<Arena::TablePage> Arena::changed_tables() const {
    Extents changed;
    private_pages(base_, 0, state_.tables_used, changed);
    std::vector<TablePage> pages;
    for (const Extent& extent : changed) {
        for (u64 at = extent.offset; at < extent.offset + extent.size; at += kPageSize) {
            TablePage page{Gpa(at), {}};
            if (at < image_->state_.tables_used) {
                read_extent(image_->fd_.get(), reinterpret_cast<u8*>(page.entries.data()),
                            {at, kPageSize});
            }
            pages.push_back(page);
        }
    }
    return pages;
}

u64 Arena::tables_since_image() const {
    return state_.tables_used - image_->state_.tables_used;
}

void Arena::restore(const Extents& extents) {
    const bool few = bytes_of(extents) <= kFewPages * kPageSize;
    for (const Extent& extent : extents) {
        if (few) {
            read_extent(image_->fd_.get(), base_ + extent.offset, extent);
        } else if (::madvise(base_ + extent.offset, extent.size, MADV_DONTNEED) != 0) {
            throw_errno("cannot reset the memory of a process");
        }
        wrote(Gpa(extent.offset), extent.size);
    }
}

void Arena::clear() {
    const u64 used = image_ || !runs_.empty() ? size_ : state_.top;
    check(map_run(0, {used}));
    image_.reset();
    runs_.clear();
    (void)watch_runs();
    state_ = fresh();
    wrote(Gpa(0), backed_);
}

}  // namespace polyvisor::process
