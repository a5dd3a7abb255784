// How many chains per second a virtqueue carries: polyvisor's Queue beside the least code that pops
// a chain into buffers and pushes it back, and checks nothing. One JSON object on stdout:
//
//     virtio_ring [ROUNDS]     {"split-1": {"ours": chains/s, "loop": chains/s}, ...}
//
// The driver's part is outside of what is measured: the rings are filled once, and each round goes
// over all of them, with the driver's index (split) or all flags (packed) put back in between.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "virtio/fake_driver.hpp"

using namespace polyvisor;
using namespace polyvisor::virtio;

namespace {

constexpr u32 kSize = 256;
constexpr u64 kDescriptors = 0x10000, kDriver = 0x20000, kDevice = 0x30000, kData = 0x100000;
constexpr int kTurns = 9;

double cpu_seconds() {
    timespec now{};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

volatile u64 sink;

// What a device without a care would do. Functions of their own, as a device calls them.
namespace Unchecked {

struct Chain {
    struct {
        u8* data;
        u32 length;
    } buffers[kSize];
    u32 count;
    u16 id, slots;
};

struct Split {
    const SplitDescriptor* descriptors;
    const SplitAvail* avail;
    SplitUsed* used;
    u8* memory;
    u16 next_avail = 0, next_used = 0;
};

[[gnu::noinline]] bool pop(Split& queue, Chain& chain) {
    if (queue.next_avail == __atomic_load_n(&queue.avail->index, __ATOMIC_ACQUIRE)) return false;
    u16 slot = chain.id = queue.avail->ring[queue.next_avail++ % kSize];
    for (chain.count = 0;;) {
        const SplitDescriptor& entry = queue.descriptors[slot];
        chain.buffers[chain.count++] = {queue.memory + entry.address, entry.length};
        if (!(entry.flags & kNext)) return true;
        slot = entry.next;
    }
}

[[gnu::noinline]] void push(Split& queue, const Chain& chain, u32 written) {
    queue.used->ring[queue.next_used++ % kSize] = {chain.id, written};
    __atomic_store_n(&queue.used->index, queue.next_used, __ATOMIC_RELEASE);
}

struct Packed {
    PackedDescriptor* descriptors;
    u8* memory;
    u32 next_avail = 0, next_used = 0;
};

[[gnu::noinline]] bool pop(Packed& queue, Chain& chain) {
    const u32 first = queue.next_avail;
    const u16 flags = __atomic_load_n(&queue.descriptors[first].flags, __ATOMIC_ACQUIRE);
    if (!(flags & kAvailFlag) || (flags & kUsedFlag)) return false;
    for (chain.count = 0;;) {
        const PackedDescriptor& entry = queue.descriptors[queue.next_avail++];
        chain.buffers[chain.count++] = {queue.memory + entry.address, entry.length};
        if (entry.flags & kNext) continue;
        chain.id = entry.id;
        chain.slots = static_cast<u16>(queue.next_avail - first);
        if (queue.next_avail >= kSize) queue.next_avail = 0;
        return true;
    }
}

[[gnu::noinline]] void push(Packed& queue, const Chain& chain, u32 written) {
    PackedDescriptor& entry = queue.descriptors[queue.next_used];
    entry.id = chain.id;
    entry.length = written;
    __atomic_store_n(&entry.flags, u16{kAvailFlag | kUsedFlag}, __ATOMIC_RELEASE);
    queue.next_used += chain.slots;
    if (queue.next_used >= kSize) queue.next_used = 0;
}

}  // namespace Unchecked

struct Bench {
    GuestMemory memory;
    QueueConfig config;
    u32 length;  // of a chain
    u32 chains;
    std::vector<u8> ring;  // as the driver left it, for packed rings

    Bench(bool packed, u32 length) : length(length), chains(kSize / length) {
        memory.add(Gpa(0), 16 << 20, "ram");
        config = {kSize, kDescriptors, kDriver, kDevice,
                  kVersion1 | (packed ? u64{kRingPacked} : 0)};
        FakeDriver driver(memory, config);
        std::vector<FakeDriver::Segment> segments;
        for (u32 n = 0; n < chains; ++n) {
            segments.clear();
            for (u32 part = 0; part < length; ++part) {
                segments.push_back(
                    {kData + 4096 * n + 1024 * part, 512, part + 1 == length && part > 0});
            }
            if (!driver.add(segments)) std::abort();
        }
        driver.publish();
        if (packed) {
            ring.resize(16 * kSize);
            memory.read(Gpa(kDescriptors), ring);
        }
    }

    void again() {
        if (!ring.empty()) memory.write(Gpa(kDescriptors), ring);
    }

    double ours(u32 rounds) {
        Queue queue(memory);
        Chain chain;
        u64 sum = 0;
        double seconds = 0;
        for (u32 round = 0; round < rounds; ++round) {
            again();
            if (!queue.configure(config)) std::abort();
            const double begin = cpu_seconds();
            for (u32 repeat = 0; repeat < (ring.empty() ? 64u : 1u); ++repeat) {
                if (ring.empty() && !queue.set_positions({0, 0})) std::abort();
                u32 served = 0;
                while (queue.pop(chain)) {
                    sum += chain.readable()[0].gpa + chain.writable_bytes();
                    queue.push(chain, 0);
                    ++served;
                    if (served % 16 == 0) queue.publish();
                }
                queue.publish();
                if (served != chains) std::abort();
            }
            seconds += cpu_seconds() - begin;
        }
        sink = sum;
        return rounds * (ring.empty() ? 64.0 : 1.0) * chains / seconds;
    }

    double loop(u32 rounds) { return ring.empty() ? split_loop(rounds) : packed_loop(rounds); }

    template <class T>
    T* at(u64 gpa) {
        return reinterpret_cast<T*>(memory.span(Gpa(gpa), sizeof(T)).data());
    }

    double split_loop(u32 rounds) {
        Unchecked::Split queue{at<SplitDescriptor>(kDescriptors), at<SplitAvail>(kDriver),
                               at<SplitUsed>(kDevice), memory.span(Gpa(0), 1).data()};
        Unchecked::Chain chain;
        u64 sum = 0;
        const double begin = cpu_seconds();
        for (u32 round = 0; round < rounds * 64; ++round) {
            queue.next_avail = queue.next_used = 0;
            while (Unchecked::pop(queue, chain)) {
                sum += reinterpret_cast<u64>(chain.buffers[0].data) + chain.count;
                Unchecked::push(queue, chain, 0);
            }
        }
        const double seconds = cpu_seconds() - begin;
        sink = sum;
        return rounds * 64.0 * chains / seconds;
    }

    double packed_loop(u32 rounds) {
        Unchecked::Packed queue{at<PackedDescriptor>(kDescriptors), memory.span(Gpa(0), 1).data()};
        Unchecked::Chain chain;
        u64 sum = 0;
        double seconds = 0;
        for (u32 round = 0; round < rounds; ++round) {
            again();
            queue.next_avail = queue.next_used = 0;
            const double begin = cpu_seconds();
            for (u32 n = 0; n < chains && Unchecked::pop(queue, chain); ++n) {
                sum += reinterpret_cast<u64>(chain.buffers[0].data) + chain.count;
                Unchecked::push(queue, chain, 0);
            }
            seconds += cpu_seconds() - begin;
        }
        sink = sum;
        return rounds * static_cast<double>(chains) / seconds;
    }
};

double best(auto&& run) {
    double most = 0;
    for (int turn = 0; turn < kTurns; ++turn) most = std::max(most, run());
    return most;
}

}  // namespace

int main(int argc, char** argv) {
    const u32 rounds = argc > 1 ? static_cast<u32>(std::strtoul(argv[1], nullptr, 0)) : 2000;
    std::printf("{");
    const char* comma = "";
    for (bool packed : {false, true}) {
        for (u32 length : {1u, 3u}) {
            Bench bench(packed, length);
            const u32 count = packed ? rounds * 16 : rounds;
            const double loop = best([&] { return bench.loop(count); });
            const double ours = best([&] { return bench.ours(count); });
            std::printf("%s\n  \"%s-%u\": {\"ours\": %.0f, \"loop\": %.0f}", comma,
                        packed ? "packed" : "split", length, ours, loop);
            comma = ",";
        }
    }
    std::printf("\n}\n");
}
