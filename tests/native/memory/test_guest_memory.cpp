// Regions, bounds, copies across regions, the write observer.
#include "memory/guest_memory.hpp"

#include <sys/stat.h>

#include <cstring>

#include "base/error.hpp"
#include "check.hpp"

using namespace polyvisor;

namespace {

void regions() {
    GuestMemory memory;
    memory.add(Gpa(0x100000), 0x4000, "high");
    auto& low = memory.add(Gpa(0), 0x2000, "low");
    CHECK_EQ(memory.regions().size(), 2u);
    CHECK(memory.regions()[0]->name == "low");  // sorted
    CHECK_EQ(memory.total_size(), 0x6000u);
    CHECK(memory.find(Gpa(0x1fff)) == &low);
    CHECK(memory.find(Gpa(0x2000)) == nullptr);
    CHECK(memory.find(Gpa(0xfffff)) == nullptr);
    CHECK(memory.find(Gpa(0x103fff)) != nullptr);
    CHECK(memory.find(Gpa(~u64{0})) == nullptr);
    CHECK_EQ(memory.load<u64>(Gpa(0x8)), 0u);
    struct stat info;
    CHECK_EQ(::fstat(low.fd.get(), &info), 0);
    CHECK_EQ(info.st_size, 0x2000);
    CHECK(info.st_blocks * 512 <= 0x1000);  // sparse: only the page that was read

    CHECK_THROWS(memory.add(Gpa(0x1000), 0x1000, "over"), MemoryRangeError);
    CHECK_THROWS(memory.add(Gpa(0xff000), 0x2000, "over"), MemoryRangeError);
    CHECK_THROWS(memory.add(Gpa(0x4000), 0, "empty"), ConfigError);
    CHECK_THROWS(memory.add(Gpa(0x4000), 0x800, "odd"), ConfigError);
    CHECK_THROWS(memory.add(Gpa(0x4001), 0x1000, "odd"), ConfigError);
    CHECK_THROWS(memory.add(Gpa(~u64{0xfff}), 0x2000, "wrap"), MemoryRangeError);
    CHECK_THROWS(memory.add(Gpa(bit(52)), 0x1000, "far"), MemoryRangeError);
    CHECK_EQ(memory.regions().size(), 2u);
}

void spans() {
    GuestMemory memory;
    memory.add(Gpa(0x1000), 0x2000, "ram");
    CHECK_EQ(memory.span(Gpa(0x1000), 0x2000).size(), 0x2000u);
    CHECK(memory.span(Gpa(0x1000), 0x2001).empty());
    CHECK(memory.span(Gpa(0xfff), 2).empty());
    CHECK(memory.span(Gpa(0x2fff), ~u64{0}).empty());
    CHECK_EQ(memory.span(Gpa(0x2fff), 1).size(), 1u);
    try {
        memory.checked(Gpa(0x2ff8), 16);
        CHECK(false);
    } catch (const MemoryRangeError& error) {
        CHECK_EQ(error.gpa, 0x2ff8u);
        CHECK_EQ(error.size, 16u);
    }
}

void copies_across_regions() {
    GuestMemory memory;
    memory.add(Gpa(0x1000), 0x1000, "a");
    memory.add(Gpa(0x2000), 0x1000, "b");
    memory.add(Gpa(0x4000), 0x1000, "c");
    u8 text[] = "across the seam";
    memory.write(Gpa(0x1ff8), text);
    u8 back[sizeof text] = {};
    memory.read(Gpa(0x1ff8), back);
    CHECK(std::memcmp(text, back, sizeof text) == 0);
    memory.store<u64>(Gpa(0x1ffc), 0x1122334455667788);
    CHECK_EQ(memory.load<u64>(Gpa(0x1ffc)), 0x1122334455667788u);
    CHECK_EQ(memory.load<u32>(Gpa(0x2000)), 0x11223344u);
    // A hole in the middle: nothing is copied.
    std::vector<u8> big(0x2000, 0xee);
    CHECK_THROWS(memory.write(Gpa(0x2800), big), MemoryRangeError);
    CHECK_EQ(memory.load<u8>(Gpa(0x2800)), 0u);
    CHECK_THROWS(memory.read(Gpa(0x2800), big), MemoryRangeError);
    CHECK_EQ(big[0], 0xee);
    CHECK_THROWS(memory.load<u8>(Gpa(0x3000)), MemoryRangeError);
    CHECK_THROWS(memory.load<u64>(Gpa(~u64{0} - 3)), MemoryRangeError);
    memory.write(Gpa(0x3000), {});  // nothing is always fine
    memory.read(Gpa(0x3000), {});
}

void observer() {
    GuestMemory memory;
    auto& ram = memory.add(Gpa(0x10000), 0x4000, "ram");
    std::vector<std::pair<u64, u64>> seen;
    memory.set_write_observer([&](Gpa gpa, u64 size) { seen.emplace_back(gpa.value, size); });
    std::vector<u8> data(0x2800, 1);
    memory.write(Gpa(0x10400), data);
    CHECK(seen.empty());  // no page has code
    ram.flags(0x10000) = kPageDirtyTrack;
    ram.flags(0x11000) = kPageCode;
    ram.flags(0x12000) = kPageCode | kPageDirtyTrack;
    memory.write(Gpa(0x10400), data);
    CHECK_EQ(seen.size(), 2u);
    CHECK(seen[0] == std::pair(u64{0x11000}, u64{0x1000}));
    CHECK(seen[1] == std::pair(u64{0x12000}, u64{0xc00}));
    seen.clear();
    memory.store<u16>(Gpa(0x11ffe), 5);
    memory.store<u16>(Gpa(0x12fff), 5);
    CHECK_EQ(seen.size(), 2u);
    CHECK(seen[0] == std::pair(u64{0x11ffe}, u64{2}));
    CHECK(seen[1] == std::pair(u64{0x12fff}, u64{1}));
    seen.clear();
    memory.note_write(Gpa(0x12345), 1);
    memory.note_write(Gpa(0x12345), 0);
    CHECK_EQ(seen.size(), 1u);
    memory.recheck_code(Gpa(0x10000), 0x4000);
    CHECK_EQ(seen.size(), 3u);
}

std::vector<u64> take(const GuestMemory::Region& region) {
    std::vector<u64> bitmap(region.bitmap_words());
    region.take_dirty(bitmap);
    return bitmap;
}

// The host's own writes, seen in the pages' dirty bits.
void dirty_bits() {
    GuestMemory memory;
    auto& low = memory.add(Gpa(0), 130 * 0x1000, "low");
    auto& next = memory.add(Gpa(130 * 0x1000), 0x3000, "next");
    auto& apart = memory.add(Gpa(0x200000), 0x1000, "apart", true);
    CHECK_EQ(low.bitmap_words(), 3u);
    CHECK_EQ(next.bitmap_words(), 1u);
    CHECK(take(low) == (std::vector<u64>{0, 0, 0}));

    memory.store<u8>(Gpa(0x5fff), 1);
    memory.store<u16>(Gpa(0x3ffff), 1);  // pages 63 and 64
    CHECK(take(low) == (std::vector<u64>{bit(5) | bit(63), bit(0), 0}));
    CHECK(take(low) == (std::vector<u64>{0, 0, 0}));  // taken

    std::vector<u8> across(0x2001);  // pages 128 and 129 of the first, 0 of the second
    memory.write(Gpa(128 * 0x1000), across);
    std::vector<u64> bitmap{0, 4, 0};
    low.take_dirty(bitmap);
    CHECK(bitmap == (std::vector<u64>{0, 4, 3}));  // what was set stays set
    CHECK(take(next) == std::vector<u64>{1});

    memory.note_write(Gpa(0), 0x300000);  // all of it, holes and ROM too
    CHECK(take(low) == (std::vector<u64>{~u64{0}, ~u64{0}, 3}));
    CHECK(take(next) == std::vector<u64>{7});
    CHECK(take(apart) == std::vector<u64>{1});
    memory.note_write(Gpa(0x200fff), ~u64{0});  // wraps: only up to the end
    CHECK(take(apart) == std::vector<u64>{1});
    CHECK(take(low) == (std::vector<u64>{0, 0, 0}));
    memory.note_write(Gpa(0x1000), 0);
    memory.recheck_code(Gpa(0), 0x1000);
    CHECK(take(low) == (std::vector<u64>{0, 0, 0}));

    // A store that fails as a whole leaves no mark.
    CHECK_THROWS(memory.write(Gpa(131 * 0x1000), std::vector<u8>(0x4000)), MemoryRangeError);
    CHECK(take(next) == std::vector<u64>{0});
}

std::string refusal(HugePages huge, Gpa start, u64 size) {
    GuestMemory memory;
    try {
        memory.add(start, size, "ram", false, huge);
    } catch (const ConfigError& error) {
        CHECK_EQ(error.field, std::string("hugepages"));
        CHECK(memory.regions().empty());
        return error.what();
    }
    return "";
}

bool contains(const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
}

void huge_pages() {
    // Host and guest addresses have the same place in a huge page, whoever asked for which.
    GuestMemory memory;
    for (u64 start : {u64{0}, u64{0x234000}, u64{1} << 32, (u64{1} << 32) + 0x1000'5000}) {
        auto& region = memory.add(Gpa(start), 0x200000, "ram", false,
                                  start == 0 ? HugePages::kTransparent : HugePages::kNone);
        u64 host = reinterpret_cast<u64>(region.host(start));
        CHECK_EQ(host % (2 << 20), start % (2 << 20));
        memory.store<u64>(Gpa(start + region.size - 8), start);
        CHECK_EQ(memory.load<u64>(Gpa(start + region.size - 8)), start);
    }

    CHECK(parse_huge_pages("none") == HugePages::kNone);
    CHECK(parse_huge_pages("transparent") == HugePages::kTransparent);
    CHECK(parse_huge_pages("2M") == HugePages::k2M);
    CHECK(parse_huge_pages("1G") == HugePages::k1G);
    CHECK_THROWS(parse_huge_pages("2m"), ConfigError);

    CHECK(contains(refusal(HugePages::k2M, Gpa(0), 0x201000), "whole pages of 2 MiB"));
    CHECK(contains(refusal(HugePages::k2M, Gpa(0x1000), 0x200000), "whole pages of 2 MiB"));
    CHECK(contains(refusal(HugePages::k1G, Gpa(0), 0x200000), "whole pages of 1 GiB"));
    // More than any host's pool holds: told now, not by a SIGBUS when it is touched.
    std::string much = refusal(HugePages::k2M, Gpa(0), u64{1} << 46);
    CHECK(contains(much, "needs 33554432 pages of 2 MiB") || contains(much, "has no pages of"));
    CHECK(contains(much, "hugepages-2048kB/nr_hugepages") || contains(much, "has no pages of"));

    // Where there is a pool, it is used.
    std::string why = refusal(HugePages::k2M, Gpa(0), 0x400000);
    if (why.empty()) {
        GuestMemory huge;
        auto& region = huge.add(Gpa(0), 0x400000, "ram", false, HugePages::k2M);
        struct stat info;
        CHECK_EQ(::fstat(region.fd.get(), &info), 0);
        CHECK_EQ(info.st_blksize, 2 << 20);
        huge.store<u64>(Gpa(0x3ffff8), 5);
        CHECK_EQ(huge.load<u64>(Gpa(0x3ffff8)), 5u);
    } else {
        CHECK(contains(why, "needs 2 pages of 2 MiB") || contains(why, "has no pages of"));
    }
}

}  // namespace

int main() {
    regions();
    spans();
    copies_across_regions();
    observer();
    dirty_bits();
    huge_pages();
    return pvtest::finish("test_guest_memory");
}
