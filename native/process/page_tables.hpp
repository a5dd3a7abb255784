// The 4-level page tables of a process VM, made by the monitor: the program's half, and the
// supervisor's pages. They lie in the arena's part for tables, and what they say is believed only
// as far as it stays there.
#pragma once

#include <vector>

#include "process/arena.hpp"

namespace polyvisor::process {

/// Rights of a page, as mmap()'s.
enum Right : u8 { kReadable = 1, kWritable = 2, kExecutable = 4, kSupervisorOnly = 8 };

class PageTables {
  public:
    /// Throws ConfigError when there is no memory for the first table.
    explicit PageTables(Arena& arena);
    /// Where the tables lie that an arena holds: goes with an image of it.
    struct State {
        Gpa root;
        u64 tables = 0;
    };
    /// Those that `arena` holds already, as a copy of another.
    PageTables(Arena& arena, const State& state) : arena_(arena), state_(state) {}
    const State& state() const { return state_; }
    void restore(const State& state) { state_ = state; }
    /// What the program's half maps becomes what it was when the arena's image was made, in tables
    /// that stay where they are: those that came since are empty, so that an engine's shadows of
    /// tables stay right. Throws HostError.
    void reset();

    u64 root() const { return state_.root.value; }
    /// Maps [gva, gva+size) to [gpa, gpa+size), all whole pages. No right at all: not present.
    /// False: no memory for a table.
    bool map(u64 gva, Gpa gpa, u64 size, u8 rights);
    void unmap(u64 gva, u64 size);
    /// Bytes of tables.
    u64 bytes() const { return state_.tables * kPageSize; }

  private:
    u64* table(Gpa gpa) const;
    u64* leaf(u64 gva, bool make);
    void find_last_level(u64 table, unsigned shift, std::vector<u64>& into) const;

    Arena& arena_;
    State state_;
};

}  // namespace polyvisor::process
