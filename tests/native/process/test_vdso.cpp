// The page that the vDSO reads, read as it does, beside the clocks that it stands for.
#include "process/vdso.hpp"

#include <elf.h>
#include <time.h>
#include <x86intrin.h>

#include <array>
#include <cmath>
#include <cstring>
#include <thread>

#include "check.hpp"
#include "process/clock_page.hpp"

using namespace polyvisor;
using namespace polyvisor::process;

namespace {

constexpr u64 kSecond = 1'000'000'000;

u64 host(clockid_t clock) {
    timespec now{};
    ::clock_gettime(clock, &now);
    return static_cast<u64>(now.tv_sec) * kSecond + static_cast<u64>(now.tv_nsec);
}

struct Instant {
    u64 tsc, time;
};

// Both at once, as nearly as can be had while others use the CPU.
Instant instant() {
    Instant best{};
    u64 least = ~u64{0};
    for (int tries = 0; tries < 50; ++tries) {
        const u64 before = __rdtsc(), time = host(CLOCK_MONOTONIC_RAW), took = __rdtsc() - before;
        if (took < least) {
            least = took;
            best = {before + took / 2, time};
        }
    }
    return best;
}

u64 host_khz() {
    const Instant before = instant();
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    const Instant after = instant();
    return (after.tsc - before.tsc) * 1'000'000 / (after.time - before.time);
}

// What vdso.c does; 0: not from there.
u64 read(const pv_clock_page& page, const pv_clock_line& line, u64 tsc) {
    const u64 elapsed = tsc - line.reference;
    return elapsed < page.valid ? line.base + (elapsed * line.multiplier >> 32) : 0;
}

void clocks(bool native, u64 khz) {
    alignas(kPageSize) std::array<u8, kPageSize> memory{};
    Clock clock;
    clock.set_tsc_khz(khz);
    ClockPage keeper(clock, native, memory.data());
    const auto& page = *reinterpret_cast<const pv_clock_page*>(memory.data());
    auto tsc = [&] { return native ? __rdtsc() : clock.tsc(); };

    // What is not known to be right is not shown.
    keeper.refresh();
    CHECK_EQ(page.valid, u64{0});
    keeper.confirm(tsc() + khz * 100'000);
    keeper.confirm(tsc() - khz * 100'000);
    keeper.refresh();
    CHECK_EQ(page.valid, u64{0});
    keeper.confirm(tsc());
    keeper.refresh();
    CHECK_EQ(page.valid, ClockPage::kValidMilliseconds * khz);
    CHECK_EQ(page.sequence % 2, u32{0});

    const u64 end = host(CLOCK_MONOTONIC) + kSecond;
    struct Row {
        clockid_t clock;
        const pv_clock_line& line;
        const s64* ahead;
        u64 last = 0, worst = 0;
    };
    const s64 none = 0;
    Row rows[] = {{CLOCK_MONOTONIC, page.monotonic, &none},
                  {CLOCK_MONOTONIC_RAW, page.raw, &none},
                  {CLOCK_REALTIME, page.monotonic, &page.realtime},
                  {CLOCK_BOOTTIME, page.monotonic, &page.boottime},
                  {CLOCK_TAI, page.monotonic, &page.tai}};
    u64 read_ones = 0, writes = 0;
    for (u64 n = 0; host(CLOCK_MONOTONIC) < end; ++n) {
        const u64 before = page.sequence;
        if (n % 16 == 0) keeper.refresh();
        writes += page.sequence != before;
        Row& row = rows[n % std::size(rows)];
        const u64 first = host(row.clock);
        u64 shown = read(page, row.line, tsc());
        const u64 second = host(row.clock);
        if (shown == 0) continue;  // this thread had to wait
        ++read_ones;
        shown += static_cast<u64>(*row.ahead);
        CHECK(shown >= row.last);
        row.last = shown;
        // Between the two, or as far off as is promised.
        const u64 off = shown < first ? first - shown : shown > second ? shown - second : 0;
        row.worst = std::max(row.worst, off);
    }
    CHECK(read_ones > 10'000);
    CHECK(writes > 10);
    for (const Row& row : rows) {
        CHECK(row.worst < 10'000);
        std::fprintf(stderr, "%s clock %d: at most %llu ns off\n", native ? "host" : "virtual",
                     row.clock, static_cast<unsigned long long>(row.worst));
    }

    // It is good for a while only.
    std::this_thread::sleep_for(std::chrono::milliseconds(ClockPage::kValidMilliseconds + 5));
    CHECK_EQ(read(page, page.monotonic, tsc()), u64{0});
    keeper.refresh();
    CHECK(read(page, page.monotonic, tsc()) != 0);
}

// Readers of other threads never see a page that is half written.
void threads() {
    alignas(kPageSize) std::array<u8, kPageSize> memory{};
    Clock clock;
    ClockPage keeper(clock, false, memory.data());
    keeper.confirm(clock.tsc());
    auto& page = *reinterpret_cast<pv_clock_page*>(memory.data());
    std::atomic<bool> done{false};
    std::thread reader([&] {
        u64 last = 0;
        while (!done) {
            const u32 sequence = __atomic_load_n(&page.sequence, __ATOMIC_ACQUIRE);
            const pv_clock_line line = {
                __atomic_load_n(&page.monotonic.reference, __ATOMIC_RELAXED),
                __atomic_load_n(&page.monotonic.base, __ATOMIC_RELAXED),
                __atomic_load_n(&page.monotonic.multiplier, __ATOMIC_RELAXED)};
            const u64 elapsed = clock.tsc() - line.reference;
            __atomic_thread_fence(__ATOMIC_ACQUIRE);
            if ((sequence & 1) || __atomic_load_n(&page.sequence, __ATOMIC_RELAXED) != sequence) {
                continue;
            }
            const u64 now = line.base + (elapsed * line.multiplier >> 32);
            if (elapsed >= ClockPage::kValidMilliseconds * 1'000'000) continue;
            CHECK(now >= last);
            last = now;
        }
    });
    for (int n = 0; n < 12; ++n) {
        keeper.refresh();
        std::this_thread::sleep_for(std::chrono::milliseconds(ClockPage::kValidMilliseconds / 2));
    }
    done = true;
    reader.join();
}

// One segment of code and nothing else, so that it can be mapped as it is.
void image() {
    const auto bytes = vdso_image();
    CHECK(bytes.size() > sizeof(Elf64_Ehdr) && bytes.size() <= 2 * kPageSize);
    Elf64_Ehdr header;
    std::memcpy(&header, bytes.data(), sizeof header);
    int loads = 0;
    for (unsigned n = 0; n < header.e_phnum; ++n) {
        Elf64_Phdr part;
        std::memcpy(&part, bytes.data() + header.e_phoff + n * sizeof part, sizeof part);
        if (part.p_type != PT_LOAD) continue;
        ++loads;
        CHECK_EQ(part.p_offset, u64{0});
        CHECK_EQ(part.p_vaddr, u64{0});
        CHECK_EQ(part.p_flags, u32{PF_R | PF_X});
        CHECK_EQ(part.p_memsz, part.p_filesz);
    }
    CHECK_EQ(loads, 1);
}

}  // namespace

int main() {
    image();
    clocks(false, 1'000'000);
    clocks(true, host_khz());
    threads();
    return pvtest::finish("vdso");
}
