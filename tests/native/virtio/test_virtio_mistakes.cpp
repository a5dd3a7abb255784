// What a driver can do wrong: each mistake breaks its queue, with the sentence that names it, and
// nothing else. Then random bytes in every part of a queue: whatever pop() gives lies in memory.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>

#include "check.hpp"
#include "random.hpp"
#include "rings.hpp"

using namespace pvtest;

namespace {

const u64 kSeed = environment_number(
    "PV_SEED", static_cast<u64>(std::chrono::steady_clock::now().time_since_epoch().count()));
const u64 kRounds = environment_number("PV_ROUNDS", 200'000);
constexpr u32 kSize = 8;
constexpr u64 kRom = 0xf000'0000;

struct Wrong {
    const char* what;  // part of the sentence
    u64 features;
    std::function<void(Rings&, FakeDriver&)> make;
};

template <class T>
void poke(Rings& rings, u64 gpa, T value) {
    rings.memory.store<T>(Gpa(gpa), value);
}

void split(Rings& rings, u32 slot, u64 address, u32 length, u16 flags, u16 next) {
    poke(rings, Rings::kDescriptors + 16 * slot, SplitDescriptor{address, length, flags, next});
}
void packed(Rings& rings, u32 slot, u64 address, u32 length, u16 flags) {
    poke(rings, Rings::kDescriptors + 16 * slot,
         PackedDescriptor{address, length, 0, static_cast<u16>(flags | kAvailFlag)});
}
// One chain that begins at `head`.
void offer(Rings& rings, u16 head) {
    poke(rings, Rings::kDriver + 4, head);
    poke(rings, Rings::kDriver + 2, u16{1});
}

constexpr u64 kData = Rings::kData, kTable = Rings::kTables;
constexpr u64 kSplit = kVersion1, kPacked = kVersion1 | kRingPacked;

const Wrong kMistakes[] = {
    {"offers 9 chains in a queue of 8", kSplit,
     [](Rings& r, FakeDriver&) { poke(r, Rings::kDriver + 2, u16{9}); }},
    {"leads to descriptor 8 of a queue of 8", kSplit, [](Rings& r, FakeDriver&) { offer(r, 8); }},
    {"leads to descriptor 300 of", kSplit,
     [](Rings& r, FakeDriver&) {
         split(r, 0, kData, 16, kNext, 300);
         offer(r, 0);
     }},
    {"descriptors lead in a circle", kSplit,
     [](Rings& r, FakeDriver&) {
         split(r, 0, kData, 16, kNext, 1);
         split(r, 1, kData, 16, kNext, 0);
         offer(r, 0);
     }},
    {"stands behind one that it writes", kSplit,
     [](Rings&, FakeDriver& d) {
         CHECK(d.add({{kData, 8, true}, {kData, 8, false}}).has_value());
         d.publish();
     }},
    {"stands behind one that it writes", kPacked,
     [](Rings&, FakeDriver& d) {
         CHECK(d.add({{kData, 8, true}, {kData, 8, false}}).has_value());
         d.publish();
     }},
    {"16 bytes at 0x3fffff8 is not in the guest's memory", kSplit,
     [](Rings&, FakeDriver& d) {
         CHECK(d.add({{Rings::kEnd - 8, 16, true}}).has_value());
         d.publish();
     }},
    {"at 0xfffffffffffffff8 is not in the guest's memory", kPacked,
     [](Rings&, FakeDriver& d) {
         CHECK(d.add({{~u64{7}, 16, false}}).has_value());
         d.publish();
     }},
    {"at 0xf0000000 is not in the guest's memory", kSplit,  // read-only
     [](Rings&, FakeDriver& d) {
         CHECK(d.add({{kRom, 16, true}}).has_value());
         d.publish();
     }},
    {"a chain is 4 GiB long or more", kSplit,
     [](Rings& r, FakeDriver&) {
         // The memory is smaller than that, so most of it is not there; the sum comes first.
         split(r, 0, kData, 0x2000000, kNext, 1);
         split(r, 1, kData, 0xfe000000, 0, 0);
         offer(r, 0);
     }},
    {"which was not negotiated", kSplit,
     [](Rings& r, FakeDriver&) {
         split(r, 0, kTable, 16, kIndirect, 0);
         offer(r, 0);
     }},
    {"which was not negotiated", kPacked,
     [](Rings& r, FakeDriver&) { packed(r, 0, kTable, 16, kIndirect); }},
    {"indirect descriptor that another one follows", kSplit | kIndirectDesc,
     [](Rings& r, FakeDriver&) {
         split(r, 0, kTable, 16, kIndirect | kNext, 1);
         offer(r, 0);
     }},
    {"indirect descriptor that another one follows", kPacked | kIndirectDesc,
     [](Rings& r, FakeDriver&) { packed(r, 0, kTable, 16, kIndirect | kNext); }},
    {"table of 0 bytes", kSplit | kIndirectDesc,
     [](Rings& r, FakeDriver&) {
         split(r, 0, kTable, 0, kIndirect, 0);
         offer(r, 0);
     }},
    {"table of 24 bytes", kPacked | kIndirectDesc,
     [](Rings& r, FakeDriver&) { packed(r, 0, kTable, 24, kIndirect); }},
    {"table of 32 bytes at 0x3fffff0 is not", kSplit | kIndirectDesc,
     [](Rings& r, FakeDriver&) {
         split(r, 0, Rings::kEnd - 16, 32, kIndirect, 0);
         offer(r, 0);
     }},
    {"table inside an indirect table", kSplit | kIndirectDesc,
     [](Rings& r, FakeDriver&) {
         split(r, 0, kTable, 16, kIndirect, 0);
         poke(r, kTable, SplitDescriptor{kTable, 16, kIndirect, 0});
         offer(r, 0);
     }},
    {"table inside an indirect table", kPacked | kIndirectDesc,
     [](Rings& r, FakeDriver&) {
         packed(r, 0, kTable, 16, kIndirect);
         poke(r, kTable, PackedDescriptor{kTable, 16, 0, kIndirect});
     }},
    {"table of 2 entries leads to its entry 2", kSplit | kIndirectDesc,
     [](Rings& r, FakeDriver&) {
         split(r, 0, kTable, 32, kIndirect, 0);
         poke(r, kTable, SplitDescriptor{kData, 16, kNext, 2});
         offer(r, 0);
     }},
    {"indirect table's descriptors lead in a circle", kSplit | kIndirectDesc,
     [](Rings& r, FakeDriver&) {
         split(r, 0, kTable, 16, kIndirect, 0);
         poke(r, kTable, SplitDescriptor{kData, 16, kNext, 0});
         offer(r, 0);
     }},
    {"more than 1024 buffers", kPacked | kIndirectDesc,
     [](Rings& r, FakeDriver&) {
         packed(r, 0, kTable, 16 * 1025, kIndirect);
         for (u32 n = 0; n < 1025; ++n) {
             poke(r, kTable + 16 * n, PackedDescriptor{kData, 1, 0, 0});
         }
     }},
    {"a chain is longer than its queue", kPacked,
     [](Rings& r, FakeDriver&) {
         for (u32 n = 0; n < kSize; ++n) packed(r, n, kData, 1, kNext);
     }},
};

void mistakes() {
    for (const Wrong& wrong : kMistakes) {
        Rings rings(wrong.features, kSize);
        rings.memory.add(Gpa(kRom), kPageSize, "rom", true);
        FakeDriver driver(rings.memory, rings.config);
        Queue queue(rings.memory);
        CHECK(queue.configure(rings.config));
        Chain chain;
        CHECK(!queue.pop(chain));
        CHECK_EQ(queue.error(), std::string());
        wrong.make(rings, driver);
        CHECK(queue.available());
        CHECK(!queue.pop(chain));
        if (queue.error().find(wrong.what) == std::string::npos) {
            CHECK_EQ(queue.error(), std::string(wrong.what));
        }
        // It stays broken, and its methods harmless, until it is configured again.
        const std::string error = queue.error();
        CHECK(!queue.ready());
        CHECK(!queue.pop(chain));
        CHECK(!queue.available());
        CHECK(!queue.enable_notify());
        queue.disable_notify();
        CHECK(!queue.publish());
        CHECK_EQ(queue.error(), error);
        FakeDriver again(rings.memory, rings.config);
        CHECK(queue.configure(rings.config));
        CHECK(again.add({{kData, 8, false}}).has_value());
        again.publish();
        CHECK(queue.pop(chain));
    }
}

void places() {
    struct {
        const char* what;
        QueueConfig config;
    } wrong[] = {
        {"size is 0", {0, 0x1000, 0x2000, 0x3000, kSplit}},
        {"size is 24", {24, 0x1000, 0x2000, 0x3000, kSplit}},
        {"size is 65536", {65536, 0x1000, 0x2000, 0x3000, kSplit}},
        {"size is 32769", {32769, 0x1000, 0x2000, 0x3000, kPacked}},
        {"descriptors at 0x1008 are not aligned", {8, 0x1008, 0x2000, 0x3000, kSplit}},
        {"available ring at 0x2001 are not aligned", {8, 0x1000, 0x2001, 0x3000, kSplit}},
        {"used ring at 0x3002 are not aligned", {8, 0x1000, 0x2000, 0x3002, kSplit}},
        {"driver events at 0x2002 are not aligned", {8, 0x1000, 0x2002, 0x3000, kPacked}},
        {"used ring, 70 bytes at 0x3ffffd0", {8, 0x1000, 0x2000, Rings::kEnd - 48, kSplit}},
        {"descriptors, 128 bytes at 0x9000000000", {8, 0x90'0000'0000, 0x2000, 0x3000, kPacked}},
        {"available ring, 22 bytes at 0xfffffffffffffff0", {8, 0x1000, ~u64{15}, 0x3000, kSplit}},
        {"used ring, 70 bytes at 0xf0000000", {8, 0x1000, 0x2000, kRom, kSplit}},
    };
    Rings rings(kSplit, kSize);
    rings.memory.add(Gpa(kRom), kPageSize, "rom", true);
    for (const auto& [what, config] : wrong) {
        Queue queue(rings.memory);
        CHECK(!queue.configure(config));
        if (queue.error().find(what) == std::string::npos) {
            CHECK_EQ(queue.error(), std::string(what));
        }
        Chain chain;
        CHECK(!queue.pop(chain));
        CHECK(!queue.ready());
    }
    Queue queue(rings.memory);
    CHECK(!queue.set_positions({0, 0}));
    CHECK(queue.configure(rings.config));
    CHECK(!queue.set_positions({9, 0}));
    CHECK(!queue.set_positions({0, 1}));
    CHECK(queue.set_positions({4, 0xfffc}));
    QueueConfig ring = rings.config;
    ring.features = kPacked;
    CHECK(queue.configure(ring));
    CHECK(!queue.set_positions({8, 0}));
    CHECK(!queue.set_positions({0, 0x8008}));
    CHECK(queue.set_positions({0x8007, 7}));
}

// Random contents, near enough to right ones to get past the first check.
void random_contents() {
    Random random(kSeed);
    u64 popped = 0, broken = 0;
    for (const Kind& kind : kKinds) {
        Rings rings(kind.features, kSize);
        rings.memory.add(Gpa(kRom), kPageSize, "rom", true);
        Queue queue(rings.memory);
        Chain chain;
        const GuestMemory::Region& ram = *rings.memory.regions()[0];
        auto address = [&] {
            switch (random.below(8)) {
                case 0:
                    return random.next();
                case 1:
                    return Rings::kEnd - random.below(64);
                case 2:
                    return kRom + random.below(8192) - 2048;
                case 3:
                    return Rings::kDescriptors + 16 * random.below(kSize);
                default:
                    return kTable + 16 * random.below(64);
            }
        };
        for (u64 round = 0; round < kRounds / std::size(kKinds); ++round) {
            CHECK(queue.configure(rings.config));
            for (u32 n = 0; n < kSize + 64; ++n) {
                const u64 at = n < kSize ? Rings::kDescriptors + 16 * n : kTable + 16 * (n - kSize);
                const u16 flags = static_cast<u16>(random.below(8) & (random.one_in(4) ? 7 : 3) &
                                                   (n < kSize ? 7 : 3));
                const u32 length = random.one_in(3) ? 16 * random.below(8) : random.below(3000);
                if (kind.features & kRingPacked) {
                    poke(rings, at,
                         PackedDescriptor{address(), length, static_cast<u16>(random.below(16)),
                                          static_cast<u16>(flags | kAvailFlag)});
                } else {
                    poke(rings, at,
                         SplitDescriptor{address(), length, flags,
                                         static_cast<u16>(random.below(9))});
                }
            }
            for (u32 n = 0; n < 2 * kSize + 6; n += 2) {
                poke(rings, Rings::kDriver + n, static_cast<u16>(random.below(10)));
            }
            for (u32 n = 0; n < 12 && queue.pop(chain); ++n) {
                ++popped;
                u64 sum[2] = {};
                bool inside = true;
                auto look = [&](std::span<const Buffer> buffers, u64& bytes, bool write) {
                    for (const Buffer& buffer : buffers) {
                        bytes += buffer.size;
                        const bool in_ram = buffer.gpa + buffer.size <= Rings::kEnd &&
                                            buffer.size != 0 && buffer.data == ram.host(buffer.gpa);
                        const bool in_rom = !write && buffer.gpa >= kRom &&
                                            buffer.gpa + buffer.size <= kRom + kPageSize;
                        inside &= in_ram || in_rom;
                    }
                };
                look(chain.readable(), sum[0], false);
                look(chain.writable(), sum[1], true);
                CHECK(inside);
                CHECK_EQ(sum[0], u64{chain.readable_bytes()});
                CHECK_EQ(sum[1], u64{chain.writable_bytes()});
                queue.push(chain, random.below(chain.writable_bytes() + 10));
                if (random.one_in(2)) queue.publish();
            }
            queue.publish();
            broken += !queue.error().empty();
        }
    }
    CHECK(popped > kRounds / 50);
    CHECK(broken > kRounds / 50);
    std::printf("%llu queues: %llu chains, %llu broken; seed %llu\n",
                static_cast<unsigned long long>(kRounds), static_cast<unsigned long long>(popped),
                static_cast<unsigned long long>(broken), static_cast<unsigned long long>(kSeed));
}

}  // namespace

int main() {
    mistakes();
    places();
    random_contents();
    return finish("test_virtio_mistakes");
}
