#include "base/log.hpp"

#include <thread>
#include <vector>

#include "check.hpp"

using namespace polyvisor;

static u64 count_of(const Log& log, const std::string& topic) {
    for (const Log::Count& count : log.counts())
        if (count.topic == topic) return count.count;
    return 0;
}

static void limits_lines_but_counts_all() {
    std::vector<std::string> lines;
    Log log([&](std::string_view line) { lines.emplace_back(line); }, 3);
    for (int i = 0; i < 10; ++i) log.note("pci", "bad BAR " + std::to_string(i));
    log.note("lapic", "reserved register");

    CHECK_EQ(lines.size(), 5u);
    CHECK_EQ(lines.at(0), "pci: bad BAR 0");
    CHECK_EQ(lines.at(2), "pci: bad BAR 2");
    CHECK_EQ(lines.at(3), "pci: more of these are only counted");
    CHECK_EQ(lines.at(4), "lapic: reserved register");
    CHECK_EQ(count_of(log, "pci"), 10u);
    CHECK_EQ(count_of(log, "lapic"), 1u);
    CHECK_EQ(count_of(log, "never"), 0u);
}

static void counts_without_a_sink() {
    Log log;
    log.note("serial", "x");
    CHECK_EQ(count_of(log, "serial"), 1u);
}

static void is_safe_from_threads() {
    std::atomic<int> printed = 0;
    Log log([&](std::string_view) { ++printed; }, 5);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
        threads.emplace_back([&] {
            for (int i = 0; i < 1000; ++i) log.note("topic", "line");
        });
    for (std::thread& thread : threads) thread.join();
    CHECK_EQ(count_of(log, "topic"), 4000u);
    CHECK_EQ(printed.load(), 6);
}

int main() {
    limits_lines_but_counts_all();
    counts_without_a_sink();
    is_safe_from_threads();
    return pvtest::finish("log");
}
