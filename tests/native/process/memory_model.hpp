// What a process's memory is to be, by brute force: each page by itself, with what it holds. And a
// process's memory without a CPU, whose accesses are those of the page walker.
#pragma once

#include <array>
#include <cstring>
#include <map>
#include <memory>

#include "mmu/walker.hpp"
#include "process/address_space.hpp"

namespace pvtest {

using namespace polyvisor;
using namespace polyvisor::process;

struct Memory {
    static constexpr u64 kSize = 256 << 20, kTables = 8 << 20;

    explicit Memory(AddressSpace::Files files, u64 limit = 128 << 20, u64 size = kSize)
        : arena(memory, size, kTables), files(files), limit(limit) {
        if (files == AddressSpace::Files::kCopied) arena.outlive_files();
        start();
    }
    /// Empty, in a new arena or one that was cleared.
    void start() {
        tables.emplace(arena);
        space.emplace(arena, *tables, limit, files);
    }
    struct State {
        PageTables::State tables;
        AddressSpace::State space;
    };
    State state() const { return {tables->state(), space->state()}; }
    void restore(const State& state, bool fork = false) {
        tables.emplace(arena, state.tables);
        if (!space) space.emplace(arena, *tables, limit, files);
        space->restore(state.space, fork);
    }

    /// The CPU's access of the program: host memory of the address, or nullptr.
    u8* access(u64 gva, bool write, bool fetch = false) {
        for (int tries = 0; tries < 3; ++tries) {
            PagingRegisters registers;
            registers.cr0 = 0x8005'0033;
            registers.cr3 = tables->root();
            registers.cr4 = 0x620;
            registers.efer = 0xd01;
            TableReader reader(memory);
            const WalkResult found = walk_pure(reader, make_paging_state(registers), gva,
                                               {.write = write, .fetch = fetch, .user = true});
            if (found.ok()) return arena.host(Gpa(found.page.gpa));
            last = space->fault(gva, found.error);
            if (last != AddressSpace::Fault::kServed) return nullptr;
        }
        last = AddressSpace::Fault::kForbidden;
        return nullptr;
    }

    GuestMemory memory;
    Arena arena;
    AddressSpace::Files files;
    u64 limit;
    std::optional<PageTables> tables;
    std::optional<AddressSpace> space;
    AddressSpace::Fault last = AddressSpace::Fault::kServed;
};

using Page = std::array<u8, kPageSize>;

/// A page that nobody has written to shares its content with others.
struct ModelPage {
    u8 rights = 0, most_rights = 7;
    std::shared_ptr<Page> data;  ///< nullptr: zeroes
    bool shared = false;
    std::shared_ptr<Page> original;  ///< what discarding gives back; nullptr: zeroes
    AddressSpace::OnFork on_fork = AddressSpace::OnFork::kCopied;
    int mapping = 0;  ///< what mremap() does not cross
};

/// A value: what a copy of it shares is never written to, but for shared pages.
class Model {
  public:
    std::map<u64, ModelPage> pages;  // by number

    void write(u64 address, u8 value) {
        ModelPage& page = pages.at(address >> kPageShift);
        if (!page.shared) {
            page.data = page.data ? std::make_shared<Page>(*page.data) : std::make_shared<Page>();
        }
        (*page.data)[address & kPageMask] = value;
    }
    u8 read(u64 address) const {
        const ModelPage& page = pages.at(address >> kPageShift);
        return page.data ? (*page.data)[address & kPageMask] : 0;
    }
    u8 rights(u64 address) const {
        auto page = pages.find(address >> kPageShift);
        return page == pages.end() ? 0 : page->second.rights;
    }
    bool mapped(u64 address, u64 size) const {
        for (u64 n = address >> kPageShift; n < (address + size) >> kPageShift; ++n) {
            if (!pages.contains(n)) return false;
        }
        return true;
    }
};

}  // namespace pvtest
