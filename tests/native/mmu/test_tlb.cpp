// The tagged TLB against a plain list of what was inserted and not flushed: a hit must be in the
// list, what was just inserted must hit, and a flush leaves alone what it has nothing to do with.
#include <algorithm>
#include <vector>

#include "check.hpp"
#include "mmu/tlb.hpp"
#include "random.hpp"

using namespace polyvisor;

namespace {

struct Known {
    u64 gva;
    u16 pcid;
    TlbPage page;

    u64 size() const { return bit(page.shift); }
    bool covers(u64 at) const { return (gva ^ at) / size() == 0; }
    bool for_pcid(u16 other) const { return page.global || pcid == other; }
};

/// Every translation that may still be cached.
struct Model {
    std::vector<Known> list;

    template <class Which>
    void flush(Which which) {
        std::erase_if(list, which);
    }
    bool allows(u64 gva, u16 pcid, TlbUse use, u64 address) const {
        return std::any_of(list.begin(), list.end(), [&](const Known& k) {
            return k.covers(gva) && k.for_pcid(pcid) &&
                   (k.page.allow >> static_cast<unsigned>(use) & 1) &&
                   k.page.address + (gva & (k.size() - 1)) == address;
        });
    }
};

/// Addresses that collide: few sets, few tags, both ends of the address space, pages in larger
/// ones.
u64 random_gva(pvtest::Random& r) {
    u64 gva = u64{r.below(3)} << 30 | u64{r.below(4)} << 21 | u64{r.below(3)} << 12 | r.below(4096);
    if (r.one_in(4)) gva |= 0xffff'ffff'0000'0000;
    if (r.one_in(16)) gva |= 0xffff'ffff'ffff'f000;
    return gva;
}

constexpr u16 kPcids[] = {0, 1, 2, 0xfff};
u16 random_pcid(pvtest::Random& r) {
    return kPcids[r.below(4)];
}
TlbUse random_use(pvtest::Random& r) {
    return static_cast<TlbUse>(r.below(kTlbUses));
}

void test_against_list(u64 steps) {
    pvtest::Random r(4);
    Tlb tlb;
    Model model;
    u64 hits = 0, flushed = 0;
    for (u64 n = 0; n < steps; ++n) {
        u64 gva = random_gva(r);
        u16 pcid = random_pcid(r);
        u64 size_before = model.list.size();
        switch (r.below(40)) {
            default: {
                TlbUse use = random_use(r);
                u64 address = ~u64{0};
                if (tlb.lookup(gva, pcid, use, address)) {
                    ++hits;
                    CHECK(model.allows(gva, pcid, use, address));
                }
                break;
            }
            case 0 ... 9: {
                TlbPage page{.shift = r.pick<u8>({12, 12, 21, 22, 30}),
                             .allow = static_cast<u8>(r.next()),
                             .global = r.one_in(4)};
                page.address = u64{r.below(1 << 16)} << 30;
                if (page.shift == 12) page.address += u64{r.below(512)} << 12;
                if (model.list.size() > 64) {
                    model.list.clear();
                    tlb.flush_all();
                }
                tlb.insert(gva, pcid, page);
                // The same page anew: the old one is gone.
                if (page.shift == 12) {
                    model.flush([&](const Known& k) {
                        return k.page.shift == 12 && k.covers(gva) &&
                               (k.pcid == pcid && k.page.global == page.global);
                    });
                }
                model.list.push_back({gva, pcid, page});
                TlbUse use = random_use(r);
                u64 address = 0;
                if (page.allow >> static_cast<unsigned>(use) & 1) {
                    // A smaller page that overlaps may answer as well.
                    CHECK(tlb.lookup(gva, pcid, use, address));
                    CHECK(model.allows(gva, pcid, use, address));
                    if (page.shift == 12) {
                        CHECK_EQ(address, page.address + (gva & kPageMask));
                    }
                }
                break;
            }
            case 10:
                tlb.flush_all();
                model.list.clear();
                break;
            case 11:
                tlb.flush_non_global(pcid);
                model.flush([&](const Known& k) { return !k.page.global && k.pcid == pcid; });
                break;
            case 12:
                tlb.flush_non_global();
                model.flush([](const Known& k) { return !k.page.global; });
                break;
            case 13:
                tlb.flush_pcid(pcid);
                model.flush([&](const Known& k) { return k.for_pcid(pcid); });
                break;
            case 14:
            case 15:
            case 16:
                tlb.flush_page(pcid, gva);
                model.flush([&](const Known& k) { return k.for_pcid(pcid) && k.covers(gva); });
                break;
        }
        flushed += size_before > model.list.size();
    }
    CHECK(hits > steps / 50);
    CHECK(flushed > steps / 50);
}

bool hits(const Tlb& tlb, u64 gva, u16 pcid) {
    u64 address;
    return tlb.lookup(gva, pcid, TlbUse::kUserRead, address);
}

// What a flush must not take with it.
void test_flushes_are_precise() {
    Tlb tlb;
    auto fill = [&] {
        tlb.flush_all();
        tlb.insert(0x1000, 1, {.address = 0x5000});
        tlb.insert(0x2000, 2, {.address = 0x6000});
        tlb.insert(0x3000, 1, {.address = 0x7000, .global = true});
        tlb.insert(0x4000'0000, 1, {.address = bit(30), .shift = 30});
        tlb.insert(0x8020'0000, 2, {.address = bit(21), .shift = 21});
    };
    auto left = [&] {
        return hits(tlb, 0x1fff, 1) << 4 | hits(tlb, 0x2000, 2) << 3 | hits(tlb, 0x3123, 2) << 2 |
               hits(tlb, 0x7fff'ffff, 1) << 1 | hits(tlb, 0x803f'ffff, 2);
    };
    fill();
    CHECK_EQ(left(), 0b11111);
    CHECK(!hits(tlb, 0x1000, 2));
    tlb.flush_non_global(1);
    CHECK_EQ(left(), 0b01101);
    fill();
    tlb.flush_non_global();
    CHECK_EQ(left(), 0b00100);
    fill();
    tlb.flush_pcid(2);
    CHECK_EQ(left(), 0b10010);
    fill();
    tlb.flush_page(2, 0x3fff);  // a global page goes whatever the PCID
    CHECK_EQ(left(), 0b11011);
    fill();
    tlb.flush_page(1, 0x5678'9abc);  // inside the page of 1 GB
    CHECK_EQ(left(), 0b11101);
    fill();
    tlb.flush_page(1, 0x2000);  // another PCID's
    CHECK_EQ(left(), 0b11111);
    fill();
    tlb.flush_page(2, 0x8030'0000);
    CHECK_EQ(left(), 0b11110);
    fill();
    tlb.flush_all();
    CHECK_EQ(left(), 0);
}

void test_four_megabytes() {
    Tlb tlb;
    tlb.insert(0x0040'0000, 0, {.address = 0x1000'0000, .shift = 22});
    tlb.insert(0x0060'0000, 0, {.address = 0x1000'0000, .shift = 22});
    u64 address = 0;
    CHECK(tlb.lookup(0x0067'8000, 0, TlbUse::kUserRead, address));
    CHECK_EQ(address, u64{0x1027'8000});
    CHECK(tlb.lookup(0x0047'8000, 0, TlbUse::kUserRead, address));
    CHECK_EQ(address, u64{0x1007'8000});
    tlb.flush_page(0, 0x0041'0000);  // one address of the page: all of it
    CHECK(!hits(tlb, 0x0067'8000, 0));
}

void test_empty() {
    Tlb tlb;
    for (u64 gva : {u64{0}, u64{0xfff}, ~u64{0}, bit(47)}) {
        for (u16 pcid : kPcids) CHECK(!hits(tlb, gva, pcid));
    }
    // 4 KiB reach: as many pages in a row as there are entries stay.
    for (u64 n = 0; n < 1024; ++n) tlb.insert(n << 12, 5, {.address = n << 12});
    u64 there = 0;
    for (u64 n = 0; n < 1024; ++n) there += hits(tlb, n << 12, 5);
    CHECK_EQ(there, u64{1024});
}

}  // namespace

int main() {
    test_empty();
    test_flushes_are_precise();
    test_four_megabytes();
    test_against_list(pvtest::environment_number("PV_TLB_STEPS", 2'000'000));
    return pvtest::finish("test_tlb");
}
