// What a program has mapped where: the areas of its half of the address space, their memory in the
// arena, and the page tables that the CPU sees them by.
//
// Everything that a program is given an address of goes through copy_in(), copy_out(), string() and
// spans(), which look at the areas and not at the page tables: an address that the program could
// not use itself is an EFAULT.
//
// Memory is given to small areas at once, and to large ones in pieces as they are touched, which is
// when it counts against the limit: a reservation is free, and a program that touches more than it
// may have is told so by fault(). What has no memory yet is an area without `gpa`; a mapping can be
// several areas that follow one another.
//
// What is behind a file's mapping depends on what may happen to it:
//  - What the program may write to privately is copied from the file, piece by piece as it is
//    touched. (Until then changes of the file show; POSIX leaves that open.)
//  - What it may only read is the file's pages, mapped by the host. If the file shrinks, the guest
//    fails on what is missing, and copies of the monitor are done by the kernel, which can fail.
//  - A shared mapping that may write is the file's pages, too. One that may not is as a private
//  one.
//  - An engine that touches the guest's memory itself would be ended by such a page. Its spaces
//    (Files::kCopied) copy what can only be read; where it can be written, see lost_pages.hpp.
// Shared memory without a file is a memfd that cannot shrink.
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "process/page_tables.hpp"

namespace polyvisor::process {

/// What the processes of a process VM may have together. (Machines are closed without the lock.)
struct MemoryBudget {
    explicit MemoryBudget(u64 limit) : limit(limit) {}
    const u64 limit;
    std::atomic<u64> used{0};
};

class AddressSpace {
  public:
    static constexpr u64 kFirst = 0x10000, kEnd = 0x7fff'ffff'f000;
    /// The highest that mappings are placed below: above it is room for the stack.
    static constexpr u64 kTop = kEnd - (u64{1} << 30);
    /// Areas that there can be, about.
    static constexpr std::size_t kMostAreas = 16384;
    /// Files that its areas keep open for it, whether it has closed them or not.
    static constexpr std::size_t kMostFiles = 512;

    enum class Files : u8 { kMapped, kCopied };
    /// `limit`: bytes of memory that the program may have, without the pages of files themselves.
    AddressSpace(Arena& arena, PageTables& tables, u64 limit, Files files = Files::kMapped);
    ~AddressSpace();
    AddressSpace(const AddressSpace&) = delete;
    /// Another limit, which others have part in. What it has counts there.
    void share(std::shared_ptr<MemoryBudget> budget);
    const std::shared_ptr<MemoryBudget>& budget() const { return budget_; }

    enum class Kind : u8 { kPrivate, kSharedFile, kSharedMemory };
    enum class OnFork : u8 { kCopied, kGone, kWiped };
    struct Area {
        u64 end = 0;
        u8 rights = 0;             ///< Right bits
        u8 most_rights = 7;        ///< that protect() may give
        bool counted = false;      ///< its memory is, against the limit
        bool shrinks = false;      ///< the memory is a file's own
        std::optional<Gpa> gpa{};  ///< of its first byte
        std::string name{};        ///< a file, "[stack]", "[heap]", or nothing
        u64 offset = 0;            ///< in the file
        Arena::File file{};
        Kind kind = Kind::kPrivate;
        OnFork on_fork = OnFork::kCopied;
    };
    using Areas = std::map<u64, Area>;
    struct Request {
        u64 address = 0;  ///< a hint, or with `fixed` the place
        u64 size = 0;
        u8 rights = 0;
        u8 most_rights = 7;
        bool fixed = false, no_replace = false;
        bool low = false;      ///< below 2 GB
        bool reserved = true;  ///< fails if it is more than what is left
        Arena::File file{};    ///< nothing: zeroes
        bool shared = false;   ///< kept by a fork; with a file, what is written reaches it
        u64 offset = 0;
        std::string name{};
        bool counted = true;
    };
    /// As mmap(): the address, or -errno.
    s64 map(const Request& request);
    s64 unmap(u64 address, u64 size);
    s64 protect(u64 address, u64 size, u8 rights);
    struct Remap {
        u64 address = 0, old_size = 0, new_size = 0;
        bool may_move = false;
        bool fixed = false;  ///< to `target`
        bool keep = false;   ///< the old place stays mapped, and empty
        u64 target = 0;
    };
    /// As mremap().
    s64 remap(const Remap& request);
    /// Mappings whose place is free to choose are placed below `top`, from then on.
    void set_top(u64 top) { state_.top = top; }
    /// Where the heap begins; then as brk().
    void set_heap(u64 start) { state_.heap_start = state_.heap_end = start; }
    u64 brk(u64 end);
    void clear();

    /// As madvise(MADV_DONTNEED): what is private becomes what it was when it was mapped.
    s64 discard(u64 address, u64 size);
    /// As madvise(MADV_POPULATE_READ).
    s64 populate(u64 address, u64 size);
    /// What a fork of this space does with the range.
    s64 set_on_fork(u64 address, u64 size, OnFork what);
    /// As msync(MS_SYNC).
    s64 sync(u64 address, u64 size);
    /// Whether all of the range is mapped.
    bool is_mapped(u64 address, u64 size) const;

    /// What a page fault of the program means (`error`: the CPU's code, SDM 3A 4.7).
    enum class Fault : u8 {
        kServed,      ///< the instruction can be executed again
        kNotMapped,   ///< SIGSEGV, SEGV_MAPERR
        kForbidden,   ///< SIGSEGV, SEGV_ACCERR
        kBeyondFile,  ///< SIGBUS
        kNoMemory,    ///< over its limit
    };
    Fault fault(u64 address, u32 error);
    /// A file is shorter than what the program sees of it: a reason for an engine to fail, and a
    /// SIGBUS.
    bool lost_file() const;
    /// The same where the engine touches memory itself, and has met such a page.
    bool recover_lost_pages();
    /// What of a file's own pages the program is to see is looked up again when it is touched.
    void give_up_files();
    /// A system call was given an address that there was no memory left for. The answer was
    /// EFAULT, but it is the program that is over its limit.
    bool exhausted() const { return exhausted_; }

    bool copy_in(u64 address, std::span<u8> into) const;
    bool copy_out(u64 address, std::span<const u8> from);
    template <class T>
    bool load(u64 address, T& value) const {
        return copy_in(address, {reinterpret_cast<u8*>(&value), sizeof value});
    }
    template <class T>
    bool store(u64 address, const T& value) {
        return copy_out(address, {reinterpret_cast<const u8*>(&value), sizeof value});
    }
    /// Up to its end, which is not part of it; nothing: it is not all there, or longer than `most`.
    std::optional<std::string> string(u64 address, std::size_t most = 4096) const;
    /// Host memory of the range, for the host's own system calls; false: not all of it can be used
    /// that way. `size` 0 gives none. The monitor itself must not touch it: it may be a file's that
    /// shrinks.
    bool spans(u64 address, u64 size, bool write, std::vector<iovec>& into);
    /// Host memory of an aligned word that the program may write to, for the monitor's own atomic
    /// accesses; nullptr: there is none, or it may shrink away.
    u32* word(u64 address);

    const Areas& areas() const { return state_.areas; }
    /// Bytes that count against the limit, and what is left for everybody.
    u64 used() const { return state_.used; }
    u64 left() const {
        const u64 used = budget_->used.load();
        return budget_->limit - std::min(budget_->limit, used);
    }
    /// Grows whenever translations that CPUs may have kept are out of date.
    u64 generation() const { return generation_; }

    /// What goes with an image of the arena.
    struct State {
        Areas areas;
        u64 heap_start = 0, heap_end = 0, used = 0;
        u64 top = kTop;  ///< where mappings are placed below
    };
    const State& state() const { return state_; }
    /// The arena and the tables are what they were then, or copies of that. `fork`: this is another
    /// process's space, which does not get all (set_on_fork()).
    void restore(const State& state, bool fork = false);

  private:
    Areas::iterator split(u64 at);
    void merge(u64 start, u64 end);
    std::optional<u64> find_gap(u64 size, u64 top) const;
    bool is_free(u64 start, u64 size) const;
    Areas::const_iterator find(u64 address) const;
    Areas::iterator find(u64 address);
    void count(u64 bytes);
    bool too_large(const Area& area, u64 size) const;
    bool may_keep(const Arena::File& file) const;
    void drop(u64 start, u64 end);
    void take_memory(u64 start, Area& area);
    bool copies_file(const Area& area) const;
    Fault give(Areas::iterator area, u64 from, u64 to);
    Fault give_piece(u64 address);
    void give_small(u64 start, u64 end);
    bool give_all(u64 address, u64 size, u8 rights);
    s64 move(const Remap& request, u64 target);
    template <class Step>
    bool each(u64 address, u64 size, u8 rights, Step step) const;

    Arena& arena_;
    PageTables& tables_;
    std::shared_ptr<MemoryBudget> budget_;
    Files files_;
    State state_;
    u64 generation_ = 0;
    bool exhausted_ = false;
};

}  // namespace polyvisor::process
