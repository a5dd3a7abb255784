// The parser of KVM's binary statistics: against files made here, and against the kernel's own.
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#include "kvm/abi.hpp"

#include <cstring>

#include "base/mapping.hpp"
#include "check.hpp"
#include "kvm/exit_names.hpp"
#include "kvm/stats.hpp"

using namespace polyvisor;
using namespace polyvisor::kvm;

namespace {

constexpr u32 kNameSize = 48, kDescriptor = 16 + kNameSize;

struct Described {
    u32 flags;
    s16 exponent;
    u16 count;
    u32 offset;
    u32 bucket;
    const char* name;
};

void put(std::vector<u8>& file, std::size_t at, const void* data, std::size_t size) {
    if (file.size() < at + size) file.resize(at + size);
    std::memcpy(&file[at], data, size);
}

// A file as the kernel makes it: header, id, descriptors, data.
std::vector<u8> make_file(const std::vector<Described>& stats, const std::vector<u64>& data) {
    u32 desc_offset = sizeof(kvm_stats_header) + kNameSize;
    u32 data_offset = desc_offset + static_cast<u32>(stats.size()) * kDescriptor;
    kvm_stats_header header{0,           kNameSize,  static_cast<u32>(stats.size()), sizeof header,
                            desc_offset, data_offset};
    std::vector<u8> file;
    put(file, 0, &header, sizeof header);
    for (std::size_t i = 0; i < stats.size(); ++i) {
        std::size_t at = desc_offset + i * kDescriptor;
        file.resize(at + kDescriptor);
        put(file, at, &stats[i].flags, 4);
        put(file, at + 4, &stats[i].exponent, 2);
        put(file, at + 6, &stats[i].count, 2);
        put(file, at + 8, &stats[i].offset, 4);
        put(file, at + 12, &stats[i].bucket, 4);
        put(file, at + 16, stats[i].name,
            std::min<std::size_t>(kNameSize, std::strlen(stats[i].name)));
    }
    file.resize(data_offset);
    put(file, data_offset, data.data(), data.size() * sizeof(u64));
    return file;
}

OwnedFd store(const std::vector<u8>& bytes) {
    OwnedFd fd(::memfd_create("stats", MFD_CLOEXEC));
    CHECK_EQ(::pwrite(fd.get(), bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
    return fd;
}

std::vector<Statistic> parse(const std::vector<u8>& bytes) {
    return StatsFile(store(bytes)).read();
}

void test_kinds_and_units() {
    std::string longest(kNameSize, 'n');  // no room for a 0 at its end
    auto stats = parse(make_file(
        {
            {KVM_STATS_TYPE_CUMULATIVE | KVM_STATS_UNIT_NONE, 0, 1, 0, 0, "exits"},
            {KVM_STATS_TYPE_INSTANT | KVM_STATS_UNIT_BOOLEAN, 0, 1, 8, 0, "blocking"},
            {KVM_STATS_TYPE_PEAK | KVM_STATS_UNIT_BYTES | KVM_STATS_BASE_POW2, 10, 1, 16, 0,
             "most"},
            {KVM_STATS_TYPE_LOG_HIST | KVM_STATS_UNIT_SECONDS, -9, 3, 24, 0, "wait_hist"},
            {KVM_STATS_TYPE_LINEAR_HIST | KVM_STATS_UNIT_CYCLES, 0, 2, 48, 5, "length"},
            {5u << KVM_STATS_TYPE_SHIFT | 9u << KVM_STATS_UNIT_SHIFT, 0, 1, 64, 0, "later"},
            {KVM_STATS_TYPE_CUMULATIVE, 0, 1, 0, 0, longest.c_str()},
        },
        {100, 1, 7, 10, 20, 30, 4, 5, ~u64{0}}));
    CHECK_EQ(stats.size(), 7u);
    if (stats.size() != 7) return;
    CHECK_EQ(stats[0].name, std::string("exits"));
    CHECK(stats[0].kind == Statistic::Kind::kCumulative && stats[0].unit == Statistic::Unit::kNone);
    CHECK_EQ(stats[0].values.at(0), 100u);
    CHECK(stats[1].kind == Statistic::Kind::kInstant && stats[1].unit == Statistic::Unit::kBoolean);
    CHECK_EQ(stats[1].values.at(0), 1u);
    CHECK(stats[2].kind == Statistic::Kind::kPeak && stats[2].unit == Statistic::Unit::kBytes);
    CHECK_EQ(stats[2].base, 2);
    CHECK_EQ(stats[2].exponent, 10);
    CHECK(stats[3].kind == Statistic::Kind::kLogHistogram && stats[3].histogram());
    CHECK_EQ(stats[3].base, 10);
    CHECK_EQ(stats[3].exponent, -9);
    CHECK(stats[3].values == (std::vector<u64>{10, 20, 30}));
    CHECK(stats[4].kind == Statistic::Kind::kLinearHistogram && stats[4].histogram());
    CHECK_EQ(stats[4].bucket_size, 5u);
    CHECK(stats[4].values == (std::vector<u64>{4, 5}));
    CHECK(stats[5].kind == Statistic::Kind::kOther && stats[5].unit == Statistic::Unit::kOther);
    CHECK_EQ(stats[5].values.at(0), ~u64{0});
    CHECK_EQ(std::string(to_string(stats[5].unit)), std::string("other"));
    CHECK_EQ(std::string(to_string(stats[3].unit)), std::string("seconds"));
    CHECK_EQ(std::string(to_string(stats[4].kind)), std::string("linear_histogram"));
    CHECK_EQ(stats[6].name, longest);

    auto counters = to_counters(stats);
    CHECK_EQ(counters.size(), 10u);
    CHECK_EQ(counters[3].name, std::string("wait_hist[0]"));
    CHECK_EQ(counters[5].value, 30u);
}

void test_values_are_read_anew() {
    auto bytes = make_file({{0, 0, 1, 0, 0, "exits"}}, {1});
    OwnedFd fd = store(bytes);
    int raw = fd.get();
    StatsFile file(std::move(fd));
    CHECK_EQ(file.read().at(0).values.at(0), 1u);
    u64 more = 2;
    CHECK_EQ(::pwrite(raw, &more, sizeof more, static_cast<off_t>(bytes.size() - 8)), 8);
    CHECK_EQ(file.read().at(0).values.at(0), 2u);
}

// A kernel with another format is no reason to fail, nor to read beyond what there is.
void test_malformed() {
    auto good = make_file({{0, 0, 1, 0, 0, "exits"}}, {1});
    CHECK_EQ(parse(good).size(), 1u);
    CHECK(parse({}).empty());
    for (std::size_t size = 1; size < good.size(); size += 7) {
        CHECK(parse({good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size)}).empty());
    }
    auto with = [&](std::size_t at, u32 value) {
        auto bad = good;
        put(bad, at, &value, sizeof value);
        return bad;
    };
    const std::size_t descriptor = sizeof(kvm_stats_header) + kNameSize;
    CHECK(parse(with(4, 0)).empty());                         // names of no size
    CHECK(parse(with(4, 0xffff'ffff)).empty());               // ... and of too much
    CHECK(parse(with(8, 0xffff'ffff)).empty());               // too many
    CHECK(parse(with(16, 0xffff'fff0)).empty());              // descriptors beyond the end
    CHECK(parse(with(20, 0xffff'fff0)).empty());              // data beyond the end
    CHECK(parse(with(descriptor + 4, 0xffff'0000)).empty());  // 65535 values
    CHECK(parse(with(descriptor + 8, 0x8000'0000)).empty());  // offset of a value
    CHECK(parse(with(descriptor + 8, 3)).empty());            // ... between values
}

void test_descriptors_that_have_none() {
    CHECK(!StatsFile(-1).available());
    CHECK(StatsFile(-1).read().empty());
    OwnedFd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
    CHECK(!StatsFile(null.get()).available());
    CHECK(read_stats(null.get()).empty());
}

void test_names() {
    CHECK_EQ(std::string(exit_name(KVM_EXIT_IO)), std::string("io"));
    CHECK_EQ(std::string(exit_name(KVM_EXIT_MMIO)), std::string("mmio"));
    CHECK_EQ(std::string(exit_name(KVM_EXIT_HLT)), std::string("hlt"));
    CHECK_EQ(std::string(exit_name(KVM_EXIT_X86_WRMSR)), std::string("wrmsr"));
    for (u32 reason = 0; reason < 100; ++reason) {
        std::string name = exit_name(reason);
        CHECK(!name.empty() && name.find_first_of("0123456789 ") == std::string::npos);
    }
}

const Statistic* find(const std::vector<Statistic>& stats, std::string_view name) {
    for (const Statistic& stat : stats) {
        if (stat.name == name) return &stat;
    }
    return nullptr;
}

// The kernel counts the exits that we see.
void test_kernel() {
    OwnedFd kvm(::open("/dev/kvm", O_RDWR | O_CLOEXEC));
    if (!kvm) {
        std::printf("the rest needs /dev/kvm\n");
        return;
    }
    OwnedFd vm(::ioctl(kvm.get(), KVM_CREATE_VM, 0));
    OwnedFd vcpu(::ioctl(vm.get(), KVM_CREATE_VCPU, 0));
    if (::ioctl(kvm.get(), KVM_CHECK_EXTENSION, KVM_CAP_BINARY_STATS_FD) <= 0) {
        CHECK(read_stats(vm.get()).empty());
        return;
    }
    StatsFile of_vm(vm.get()), of_vcpu(vcpu.get());
    CHECK(of_vm.available() && of_vcpu.available());
    CHECK(!of_vm.read().empty());
    auto before = of_vcpu.read();
    CHECK(before.size() > 10);
    const Statistic* exits = find(before, "exits");
    CHECK(exits != nullptr && exits->kind == Statistic::Kind::kCumulative &&
          exits->values.size() == 1);
    const Statistic* wait = find(before, "halt_wait_ns");
    CHECK(wait != nullptr && wait->unit == Statistic::Unit::kSeconds && wait->exponent == -9);
    const Statistic* histogram = find(before, "halt_wait_hist");
    CHECK(histogram != nullptr && histogram->histogram() && histogram->values.size() > 8);
    if (exits == nullptr) return;

    // Where a CPU starts: out 0x80, al; jmp to it.
    Mapping code(-1, 0, 4096);
    std::memcpy(code.data() + 0xff0, "\xe6\x80\xeb\xfc", 4);
    kvm_userspace_memory_region region{0, 0, 0xffff'f000, 4096, reinterpret_cast<u64>(code.data())};
    CHECK_EQ(::ioctl(vm.get(), KVM_SET_USER_MEMORY_REGION, &region), 0);
    Mapping mapping(vcpu.get(), 0, 4096);
    auto* run = reinterpret_cast<kvm_run*>(mapping.data());
    for (int i = 0; i < 10; ++i) {
        CHECK_EQ(::ioctl(vcpu.get(), KVM_RUN, 0), 0);
        CHECK_EQ(run->exit_reason, u32{KVM_EXIT_IO});
    }
    auto after = of_vcpu.read();
    CHECK(find(after, "exits")->values[0] >= exits->values[0] + 10);
}

}  // namespace

int main() {
    test_kinds_and_units();
    test_values_are_read_anew();
    test_malformed();
    test_descriptors_that_have_none();
    test_names();
    test_kernel();
    return pvtest::finish("test_stats");
}
