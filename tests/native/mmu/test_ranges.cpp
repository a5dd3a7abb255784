// All mappings of an address space, searches and copies, on random tables that alias, cycle and
// point outside: what the scanner yields is what AddressSpace::translate() finds page by page, and
// everything ends. tests/mmu/test_inspection.py has the named cases.
#include <algorithm>
#include <cstring>
#include <map>
#include <random>

#include "check.hpp"
#include "mmu/find.hpp"

using namespace polyvisor;

namespace {

constexpr u64 kPages = 24;
std::mt19937_64 dice(7);

u64 below(u64 limit) {
    return dice() % limit;
}

std::shared_ptr<GuestMemory> random_memory(bool narrow) {
    auto memory = std::make_shared<GuestMemory>();
    memory->add(Gpa(0), kPages * kPageSize, "ram");
    for (u64 page = 1; page < kPages; ++page) {
        u64 entries[4];
        for (u64& entry : entries) {
            u64 to = below(16) == 0 ? dice() & 0xf'ffff'f000 : below(kPages) * kPageSize;
            entry = to | (below(8) != 0) | (dice() & 0x17e);
            if (below(12) == 0) entry |= kPtePageSize;
            if (below(40) == 0) entry |= u64{1} << 45;
            if (below(10) == 0) entry |= kPteNoExecute;
            if (narrow) entry &= 0xffff'ffff;
        }
        for (u64 at = 0; at < kPageSize; at += narrow ? 4 : 8) {
            const u64 entry = entries[(at >> 3) & 3];
            if (narrow) {
                memory->store<u32>(Gpa(page * kPageSize + at), static_cast<u32>(entry));
            } else {
                memory->store<u64>(Gpa(page * kPageSize + at), entry);
            }
        }
    }
    return memory;
}

PagingState random_paging(PagingMode mode) {
    PagingRegisters r;
    u64 pdpte[4];
    for (u64& entry : pdpte) entry = below(kPages) * kPageSize | (below(6) != 0);
    r.cr0 = bit(0) | bit(31);
    r.cr4 = (mode != PagingMode::k32Bit ? bit(5) : 0) | (below(2) ? bit(4) : 0) |
            (mode == PagingMode::k5Level ? bit(12) : 0) | (below(2) ? bit(7) : 0) | bit(20) |
            bit(21);
    r.efer = (mode >= PagingMode::k4Level ? bit(10) | bit(8) : 0) | (below(4) ? bit(11) : 0);
    r.cr3 = (1 + below(kPages - 1)) * kPageSize;
    r.physical_mask = bit(40) - 1;
    r.pages_1gb = below(2);
    r.pdpte = pdpte;
    return make_paging_state(r);
}

u64 random_page(PagingMode mode) {
    u64 gva = dice() & ~kPageMask;
    if (mode == PagingMode::k4Level) return static_cast<u64>(sign_extend(gva, 48));
    if (mode == PagingMode::k5Level) return static_cast<u64>(sign_extend(gva, 57));
    return gva & 0xffff'ffff;
}

void compare(PagingMode mode) {
    AddressSpace space(random_memory(mode == PagingMode::k32Bit), random_paging(mode));
    const u64 start = random_page(mode);
    const u64 last = start + below(600) * kPageSize + kPageMask;
    if (last < start) return;
    std::map<u64, MappedRange> found;  // by page
    MappingScanner scanner(space, start, last);
    u64 before = 0;
    for (MappedRange page; scanner.next(page);) {
        CHECK(page.gva >= start && page.gva + page.size - 1 <= last);
        CHECK(found.empty() || page.gva >= before);
        before = page.gva + page.size;
        for (u64 at = page.gva; at != page.gva + page.size; at += kPageSize) found[at] = page;
    }
    CHECK(!scanner.exhausted());
    RangeList list = list_ranges(space, {.start = start, .last = last});
    u64 listed = 0;
    for (const MappedRange& range : list.ranges) listed += range.size / kPageSize;
    CHECK_EQ(listed, found.size());
    for (u64 page = start; page < last && page >= start; page += kPageSize) {
        auto physical = space.translate(page);
        auto item = found.find(page);
        CHECK_EQ(physical.has_value(), item != found.end());
        if (!physical) continue;
        const MappedRange& range = item->second;
        CHECK_EQ(*physical, range.physical + (page - range.gva));
        WalkReport report = space.walk(page, {}, WalkEffects::kProbe);
        CHECK_EQ(report.shift, range.shift);
        CHECK_EQ(report.user, range.user);
        CHECK_EQ(report.writable, range.writable);
        CHECK_EQ(report.executable, range.executable);
        CHECK_EQ(report.global, range.global);
    }
}

// Limits are met and told, and where to go on leads through all of it.
void limits(PagingMode mode) {
    AddressSpace space(random_memory(mode == PagingMode::k32Bit), random_paging(mode));
    RangeOptions options;
    options.limit = 50;
    options.budget = 100'000;
    u64 before = 0;
    for (int turn = 0; turn < 20; ++turn) {
        RangeList list = list_ranges(space, options);
        CHECK(list.ranges.size() <= options.limit);
        for (const MappedRange& range : list.ranges) {
            CHECK(range.gva >= before);
            before = range.gva + range.size;
        }
        if (!list.truncated) break;
        CHECK(list.next >= options.start);
        CHECK(turn == 0 || list.next > options.start || list.ranges.empty());
        options.start = list.next;
    }
    FindOptions some;
    some.bytes = 1 << 20;
    some.budget = 100'000;
    const u8 pattern[] = {0x67, 0x00, 0x00};
    FindResult result = find_bytes(space, pattern, some);
    CHECK(result.looked <= some.bytes);
    CHECK(result.matches.size() <= some.limit);
    for (u64 match : result.matches) {
        u8 bytes[3];
        CHECK_EQ(int{read_virtual(space, match, bytes).reason}, int{CopyFault::kNone});
        CHECK(std::memcmp(bytes, pattern, 3) == 0);
    }
}

// Writing does all or nothing; memory that is sealed is not written at all.
void copies() {
    auto memory = std::make_shared<GuestMemory>();
    memory->add(Gpa(0), 16 * kPageSize, "ram");
    static u8 image[kPageSize * 2] alignas(8);
    memory->add_mapping(Gpa(0x100000), Mapping::borrowed(image, sizeof image), "image", false);
    for (u64 n = 0; n < 3; ++n) memory->store<u64>(Gpa((n + 1) * 4096), (n + 2) * 4096 | 7);
    memory->store<u64>(Gpa(0x4000), 0x8000 | 7);
    memory->store<u64>(Gpa(0x4008), 0x6000 | 7);
    memory->store<u64>(Gpa(0x4010), 0x100000 | 7);
    PagingRegisters r;
    r.cr0 = bit(0) | bit(31);
    r.cr4 = bit(5);
    r.efer = bit(8) | bit(10);
    r.cr3 = 0x1000;
    AddressSpace space(memory, make_paging_state(r));
    std::vector<u8> data(2 * kPageSize), back(2 * kPageSize);
    for (u8& byte : data) byte = static_cast<u8>(dice());
    CHECK_EQ(int{write_virtual(space, 0, data).reason}, int{CopyFault::kNone});
    CHECK_EQ(int{read_virtual(space, 0, back).reason}, int{CopyFault::kNone});
    CHECK(back == data);
    CHECK_EQ(memory->load<u8>(Gpa(0x8000)), data[0]);
    CHECK_EQ(memory->load<u8>(Gpa(0x6000)), data[4096]);
    CopyFault fault = write_virtual(space, 0x1800, back);
    CHECK_EQ(int{fault.reason}, int{CopyFault::kReadOnly});
    CHECK_EQ(fault.gva, u64{0x2000});
    CHECK_EQ(memory->load<u8>(Gpa(0x6800)), data[0x1800]);
    CHECK(std::all_of(std::begin(image), std::end(image), [](u8 byte) { return byte == 0; }));
    fault = check_virtual(space, 0x2000, 1 << 20, false);
    CHECK_EQ(int{fault.reason}, int{CopyFault::kNotMapped});
    CHECK_EQ(fault.gva, u64{0x3000});
    // A page's end and the next one's beginning, which are not neighbours in memory.
    const std::span<const u8> across(data.data() + 4090, 12);
    FindResult result = find_bytes(space, across);
    CHECK(result.matches == std::vector<u64>{4090});
    CHECK(result.complete);
}

}  // namespace

int main() {
    for (PagingMode mode :
         {PagingMode::k32Bit, PagingMode::kPae, PagingMode::k4Level, PagingMode::k5Level}) {
        for (int turn = 0; turn < 60; ++turn) compare(mode);
        for (int turn = 0; turn < 6; ++turn) limits(mode);
    }
    copies();
    return pvtest::finish("test_ranges");
}
