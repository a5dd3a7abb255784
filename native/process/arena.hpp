// The physical memory of a process VM: one range of host addresses, of which pages are handed out
// in runs. It costs nothing until it is touched, and a run that is given back reads as zero when it
// is handed out again.
//
// The tables, and the supervisor's pages, have a part of their own at the beginning, which is never
// handed out as the program's memory: a system call that still writes to memory that another thread
// has unmapped meanwhile can hit the program's pages, but never a page table.
//
// What an arena holds can be frozen to an image. Any number of arenas adopt it, copy on write: it
// is one mapping of the host in each, and costs an arena what it writes to. reset() takes that
// back. What was written to is what the kernel says has been copied, whoever wrote it: the
// program, the monitor, or a system call of the monitor.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <optional>

#include "base/fd.hpp"
#include "base/mapping.hpp"
#include "memory/guest_memory.hpp"
#include "process/lost_pages.hpp"

namespace polyvisor::process {

class ArenaImage;

/// Free runs of a range of addresses: a value.
class FreeRuns {
  public:
    void add(u64 start, u64 size);
    /// The run at `near` when it is free; else the smallest that fits, so that long runs stay, from
    /// `low` on if there is one.
    std::optional<u64> take(u64 size, std::optional<u64> near = {}, u64 low = 0);

  private:
    using Runs = std::map<u64, u64>;  // start to size
    u64 take_from(Runs::iterator run, u64 start, u64 size);

    Runs runs_;
};

class Arena {
  public:
    using File = std::shared_ptr<const OwnedFd>;
    /// Mappings of files and the like that an arena has at most: the host's process has 65530 for
    /// all that it does (vm.max_map_count), and a program may fork.
    static constexpr std::size_t kMostRuns = 192;

    /// `size` bytes from guest-physical address 0 on, of which the first `tables` are for
    /// allocate_table(). `memory` gets a region for the beginning, and others as more is handed
    /// out: an engine may need memory of its own for each page of a region. Throws HostError.
    Arena(GuestMemory& memory, u64 size, u64 tables);

    /// `size` bytes (of whole pages) that follow one another, if possible at `near`; nothing when
    /// there are none.
    std::optional<Gpa> allocate(u64 size, std::optional<Gpa> near = {});
    /// A run, or part of one. What was there is gone, and the guest's CPUs have forgotten it.
    void free(Gpa gpa, u64 size);
    /// It reads as zero, as after allocate().
    void discard(Gpa gpa, u64 size);
    /// Of the part for page tables and the supervisor; not given back.
    std::optional<Gpa> allocate_table(u64 size = kPageSize);
    bool is_table(u64 gpa) const { return gpa < tables_; }

    /// Puts a file behind an allocated run: its own pages (`shared`), or copies of those that are
    /// written to. An errno, or 0.
    int map_file(Gpa gpa, u64 size, File file, u64 offset, bool shared);
    /// Whether there is one.
    bool is_file(Gpa gpa) const;
    /// The engine, and others of this process, touch what map_file() puts there: a page of a file
    /// that is shortened becomes zero. Throws HostError.
    void outlive_files();
    /// Whether that has happened since this was asked last.
    bool lost_pages() { return lost_ && lost_->take(); }
    /// There is room for another mapping.
    bool may_map() const { return runs_.size() < kMostRuns; }
    /// Makes the engine forget what rights the guest had to these pages; their content stays.
    void forget_rights(Gpa gpa, u64 size) const;
    /// The monitor has written there: code that the engine made of it is out of date.
    void wrote(Gpa gpa, u64 size) const { memory_.recheck_code(gpa, size); }

    // --- Images; the guest's CPUs stand still ----------------------------------------------------

    /// Private mappings of files: stay so in the image, or are copied to it.
    enum class Files : u8 { kKept, kCopied };
    /// All that it holds. Costs what its pages cost: 0.5 ms per MB or more, and nothing for what
    /// was handed out and never touched. Throws HostError.
    std::shared_ptr<const ArenaImage> freeze(Files files) const;
    /// Becomes a copy of an arena of the same size and the same part for tables, whatever it held.
    /// Throws HostError; then it is to be cleared.
    void adopt(std::shared_ptr<const ArenaImage> image);
    /// Becomes a copy of `parent`. `alone`: nothing that is under way writes to the parent's
    /// memory, which may then share what it has.
    void fork(Arena& parent, bool alone);
    /// Back to the image that was adopted. Costs a look at what is in use, and what was written to.
    /// kKept: the part for tables stays as it is, which PageTables::reset() sees to.
    enum class Tables : u8 { kRestored, kKept };
    void reset(Tables tables = Tables::kRestored);
    /// What the image has in pages of the part for tables that were written to since, with their
    /// addresses. Throws HostError.
    struct TablePage {
        Gpa gpa;
        std::array<u64, kPageSize / 8> entries;
    };
    std::vector<TablePage> changed_tables() const;
    /// Bytes that were handed out of the part for tables since the image was adopted.
    u64 tables_since_image() const;
    /// What is called when there is more memory than the engine has been told of.
    void set_growth(std::function<void()> growth) { growth_ = std::move(growth); }
    /// Back to what the constructor gave: all is free, and zero.
    void clear();
    const std::shared_ptr<const ArenaImage>& image() const { return image_; }

    u8* host(Gpa gpa) const { return base_ + gpa.value; }
    u64 size() const { return size_; }
    /// Of the program's part.
    u64 allocated() const { return state_.allocated; }

  private:
    friend class ArenaImage;
    using Extents = std::vector<GuestMemory::Extent>;
    // What is mapped there is not what is below: zeroes, or the image.
    struct Run {
        u64 end = 0;
        File file{};  ///< nothing: zeroes, in front of the image
        u64 offset = 0;
        bool shared = false;
        bool operator==(const Run&) const = default;
    };
    using Runs = std::map<u64, Run>;
    struct State {
        u64 tables_used = 0, allocated = 0;
        u64 top = 0;  ///< nothing from here on was ever handed out
        FreeRuns free;
    };
    State fresh() const;
    u64 image_end() const;
    int map_base(u64 start, u64 end);
    int map_run(u64 start, const Run& run);
    void put_run(u64 start, Run run);
    void cut_runs(u64 start, u64 end);
    int watch_runs();
    bool has_runs(u64 start, u64 end) const;
    bool make_zero(u64 start, u64 end);
    void private_extents(u64 end, Extents& into) const;
    void restore(const Extents& extents);

    void back(u64 end);

    GuestMemory& memory_;
    std::shared_ptr<void> owner_;  // of the host's addresses: each region has it, too
    u8* base_;
    u64 backed_ = 0;  // the engine knows of what is below
    std::function<void()> growth_;
    u64 size_, tables_;
    State state_;
    Runs runs_;
    std::unique_ptr<LostPages> lost_;
    std::shared_ptr<const ArenaImage> image_;
};

/// What an arena held at a time. It needs nobody, and does not change.
class ArenaImage {
  public:
    /// Bytes of memory that it takes.
    u64 bytes() const { return bytes_; }

  private:
    friend class Arena;
    OwnedFd fd_;  // the arena's content, at the same offsets
    u64 size_ = 0, tables_ = 0;
    u64 end_ = 0, bytes_ = 0;
    Arena::Extents extents_;  // that are not zero
    Arena::Runs runs_;        // in front of it
    Arena::State state_;
};

}  // namespace polyvisor::process
