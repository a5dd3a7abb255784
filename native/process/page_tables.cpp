#include "process/page_tables.hpp"

#include <algorithm>

#include "base/error.hpp"
#include "mmu/format.hpp"

namespace polyvisor::process {

namespace {

constexpr unsigned kTopShift = 39, kLevelBits = 9;
constexpr u64 kTableEntry = kPtePresent | kPteWritable | kPteUser | kPteAccessed;

u64 leaf_entry(u64 gpa, u8 rights) {
    if ((rights & (kReadable | kWritable | kExecutable)) == 0) return 0;
    u64 entry = gpa | kPtePresent | kPteAccessed | kPteDirty;
    if (rights & kWritable) entry |= kPteWritable;
    if (!(rights & kExecutable)) entry |= kPteNoExecute;
    if (!(rights & kSupervisorOnly)) entry |= kPteUser;
    return entry;
}

// An engine's walker reads entries while they are written.
void store(u64* at, u64 entry) {
    __atomic_store_n(at, entry, __ATOMIC_RELEASE);
}

}  // namespace

PageTables::PageTables(Arena& arena) : arena_(arena) {
    auto root = arena.allocate_table();
    if (!root) throw ConfigError("memory", "a process needs more memory than that");
    state_ = {*root, 1};
}

// nullptr: nobody made that table here.
u64* PageTables::table(Gpa gpa) const {
    return arena_.is_table(gpa.value) ? reinterpret_cast<u64*>(arena_.host(gpa)) : nullptr;
}

// The last-level entry of `gva`; nullptr when there is no table, and none is to be (or can be)
// made.
u64* PageTables::leaf(u64 gva, bool make) {
    u64* at = table(state_.root);
    for (unsigned shift = kTopShift; shift > kPageShift; shift -= kLevelBits) {
        u64& entry = at[gva >> shift & 511];
        if (!(entry & kPtePresent)) {
            auto made = make ? arena_.allocate_table() : std::nullopt;
            if (!made) return nullptr;
            ++state_.tables;
            store(&entry, made->value | kTableEntry);
        }
        at = table(Gpa(entry & kPteAddress));
        if (at == nullptr) return nullptr;
    }
    return &at[gva >> kPageShift & 511];
}

bool PageTables::map(u64 gva, Gpa gpa, u64 size, u8 rights) {
    for (u64 done = 0; done < size;) {
        u64* entry = leaf(gva + done, true);
        if (entry == nullptr) return false;
        // To the end of this table.
        do {
            store(entry++, leaf_entry(gpa.value + done, rights));
            done += kPageSize;
        } while (done < size && ((gva + done) >> kPageShift & 511) != 0);
    }
    return true;
}

void PageTables::unmap(u64 gva, u64 size) {
    constexpr u64 kTableSpan = u64{512} << kPageShift;
    for (u64 done = 0; done < size;) {
        u64* entry = leaf(gva + done, false);
        const u64 rest = kTableSpan - ((gva + done) & (kTableSpan - 1));
        const u64 here = std::min(size - done, rest);
        if (entry != nullptr) {
            for (u64 n = 0; n < here / kPageSize; ++n) store(entry + n, 0);
        }
        done += here;
    }
}

// The tables below `table`, whose entries stand for 1 << `shift` bytes each, that map pages.
void PageTables::find_last_level(u64 from, unsigned shift, std::vector<u64>& into) const {
    const u64* entries = table(Gpa(from));
    if (entries == nullptr) return;
    // Of the top one, the program's half.
    const unsigned count = shift == kTopShift ? 256 : 512;
    for (unsigned n = 0; n < count; ++n) {
        if (!(entries[n] & kPtePresent)) continue;
        const u64 next = entries[n] & kPteAddress;
        if (shift == kPageShift + kLevelBits) {
            into.push_back(next);
        } else {
            find_last_level(next, shift - kLevelBits, into);
        }
    }
}

void PageTables::reset() {
    std::vector<u64> last;
    find_last_level(state_.root.value, kTopShift, last);
    std::sort(last.begin(), last.end());
    std::vector<u64> pages;  // that other entries than before lead to
    for (const Arena::TablePage& page : arena_.changed_tables()) {
        if (!std::binary_search(last.begin(), last.end(), page.gpa.value)) continue;
        u64* entries = table(page.gpa);
        for (std::size_t n = 0; n < page.entries.size(); ++n) {
            if (entries[n] == page.entries[n]) continue;
            if (entries[n] & kPtePresent) pages.push_back(entries[n] & kPteAddress);
            store(&entries[n], page.entries[n]);
        }
    }
    std::sort(pages.begin(), pages.end());
    for (std::size_t n = 0; n < pages.size();) {
        const u64 start = pages[n];
        u64 end = start;
        for (; n < pages.size() && pages[n] <= end; ++n) end = pages[n] + kPageSize;
        arena_.forget_rights(Gpa(start), end - start);
    }
}

}  // namespace polyvisor::process
