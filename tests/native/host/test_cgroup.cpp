// Cgroups without a kernel's: what mount tables mean, what is written for which limit, and v2 on a
// tree of plain files. tests/vps/ does the rest on the host's own.
#include "host/cgroup.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>

#include "base/error.hpp"
#include "check.hpp"
#include "host/cgroup_devices.hpp"

namespace {

using namespace polyvisor;
using namespace polyvisor::host;
namespace fs = std::filesystem;

// Every line of settings as "file=value", in order.
std::string written(const CgroupLimits& limits, const char* controller, bool v2, bool change) {
    std::string text;
    for (const auto& setting : cgroup_settings(limits, controller, v2, change)) {
        text += std::string(setting.file) + "=" + setting.value + (setting.needed ? "\n" : "?\n");
    }
    return text;
}

void test_settings() {
    CgroupLimits none;
    CgroupLimits some;
    some.memory = 1 << 20;
    some.cpu_quota = 50'000;
    some.cpu_burst = 20'000;
    some.cpu_shares = 2;
    some.pids = 7;
    some.cpuset = "0-1";
    some.io = {{8, 16, 1000, std::nullopt}};
    some.devices = {{{'c', 1, 3, true, true, false}, {'b', 8, std::nullopt, true, false, true}}};
    CgroupLimits swapping = some;
    swapping.swap = 1 << 19;

    for (const char* controller : kControllers) {
        CHECK(!limits_need(none, controller));
        CHECK(limits_need(some, controller));
        CHECK_EQ(written(none, controller, false, false), "");
        CHECK_EQ(written(none, controller, true, false), "");
    }
    // The files and their grammar: cgroup-v1/memory.rst, cgroup-v2.rst ("Interface Files"),
    // scheduler/sched-bwc.rst, cgroup-v1/blkio-controller.rst, cgroup-v1/devices.rst.
    CHECK_EQ(written(some, "memory", false, false),
             "memory.limit_in_bytes=1048576\nmemory.memsw.limit_in_bytes=1048576?\n");
    CHECK_EQ(written(swapping, "memory", false, true),
             "memory.memsw.limit_in_bytes=-1\nmemory.limit_in_bytes=1048576\n"
             "memory.memsw.limit_in_bytes=1572864\n");
    CHECK_EQ(written(some, "memory", true, false), "memory.swap.max=0?\nmemory.max=1048576\n");
    CHECK_EQ(written(swapping, "memory", true, false),
             "memory.swap.max=524288\nmemory.max=1048576\n");
    CHECK_EQ(written(none, "memory", true, true), "memory.swap.max=max?\nmemory.max=max\n");
    CHECK_EQ(written(none, "memory", false, true),
             "memory.memsw.limit_in_bytes=-1?\nmemory.limit_in_bytes=-1\n");
    CHECK_EQ(written(some, "cpu", false, false),
             "cpu.cfs_quota_us=50000\ncpu.cfs_burst_us=20000\ncpu.shares=2\n");
    CHECK_EQ(written(some, "cpu", true, false),
             "cpu.max=50000 100000\ncpu.max.burst=20000\ncpu.weight=1\n");
    CHECK_EQ(written(none, "cpu", true, true),
             "cpu.max.burst=0?\ncpu.max=max 100000\ncpu.weight=100\n");
    CHECK_EQ(written(none, "cpu", false, true),
             "cpu.cfs_burst_us=0?\ncpu.cfs_quota_us=-1\ncpu.shares=1024\n");
    for (bool v2 : {false, true}) {
        CHECK_EQ(written(some, "pids", v2, false), "pids.max=7\n");
        CHECK_EQ(written(none, "pids", v2, true), "pids.max=max\n");
        CHECK_EQ(written(some, "cpuset", v2, false), "cpuset.cpus=0-1\n");
    }
    CHECK_EQ(written(some, "io", false, false), "blkio.throttle.read_bps_device=8:16 1000\n");
    CHECK_EQ(written(some, "io", false, true),
             "blkio.throttle.read_bps_device=8:16 1000\nblkio.throttle.write_bps_device=8:16 0\n");
    CHECK_EQ(written(some, "io", true, false), "io.max=8:16 rbps=1000 wbps=max\n");
    CHECK_EQ(written(some, "devices", false, false),
             "devices.deny=a\ndevices.allow=c 1:3 rw\ndevices.allow=b 8:* rm\n");
    CHECK_EQ(written(none, "devices", false, true), "devices.allow=a\n");
    CHECK_EQ(written(some, "devices", true, false), "");  // the BPF program's
}

void test_weights() {
    // The ends of both ranges, and the kernel's defaults' neighbourhood, by the OCI formula.
    const std::map<u64, std::string> kTable{
        {2, "1"}, {1024, "39"}, {2048, "79"}, {262'144, "10000"}};
    for (const auto& [shares, weight] : kTable) {
        CgroupLimits limits;
        limits.cpu_shares = shares;
        CHECK_EQ(written(limits, "cpu", true, false), "cpu.weight=" + weight + "\n");
    }
}

void test_hierarchies() {
    // Debian 12 with systemd.
    auto unified = find_hierarchies(
        "24 1 254:1 / / rw - ext4 /dev/vda1 rw\n"
        "30 23 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n",
        "0::/user.slice/user-1000.slice/user@1000.service/app.slice/x.scope\n");
    CHECK_EQ(unified.size(), 1u);
    CHECK(unified[0].v2);
    CHECK_EQ(unified[0].mount, "/sys/fs/cgroup");
    CHECK_EQ(unified[0].own, "/user.slice/user-1000.slice/user@1000.service/app.slice/x.scope");
    // systemd.unified_cgroup_hierarchy=0: hybrid, with several controllers in one hierarchy.
    auto hybrid = find_hierarchies(
        "31 25 0:27 / /sys/fs/cgroup/systemd rw shared:9 - cgroup cgroup rw,xattr,name=systemd\n"
        "32 25 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct\n"
        "33 25 0:28 / /mnt/again rw - cgroup cgroup rw,cpu,cpuacct\n"
        "34 25 0:29 / /sys/fs/cgroup/bl\\040kio rw - cgroup cgroup rw,blkio\n"
        "35 25 0:30 / /sys/fs/cgroup/unified rw shared:4 - cgroup2 cgroup2 rw\n",
        "5:name=systemd:/a\n4:cpu,cpuacct:/b\n3:blkio:/c:d\n0::/e\n");
    CHECK_EQ(hybrid.size(), 4u);
    CHECK(hybrid[0].v2 && hybrid[0].own == "/e");
    CHECK(hybrid[1].has("name=systemd") && hybrid[1].own == "/a");
    CHECK(hybrid[2].has("cpu") && hybrid[2].has("cpuacct") && hybrid[2].own == "/b");
    CHECK(hybrid[3].has("io") && hybrid[3].own == "/c:d");
    CHECK_EQ(hybrid[3].mount, "/sys/fs/cgroup/bl kio");
    // A container that sees its own part of the tree.
    auto part = find_hierarchies("9 8 0:27 /docker/abc /cg ro - cgroup2 cgroup rw\n",
                                 "0::/docker/abc/inner\n");
    CHECK_EQ(part[0].own, "/inner");
    CHECK(find_hierarchies("nonsense\n\n- cgroup2\n", "x\n").empty());
}

void put(const fs::path& path, const std::string& text) {
    std::ofstream(path) << text;
}

std::string get(const fs::path& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
}

struct FakeTree {
    FakeTree() {
        char name[] = "/tmp/pv-cgroup-XXXXXX";
        root = ::mkdtemp(name);
        box = root / "polyvisor" / "box";
        fs::create_directories(box);
        for (const fs::path& path : {root, root / "polyvisor"}) {
            put(path / "cgroup.controllers", "cpuset cpu io memory pids\n");
            put(path / "cgroup.subtree_control", "");
        }
        for (const char* file : {"memory.max", "memory.swap.max", "cpu.max", "cpu.max.burst",
                                 "cpu.weight", "pids.max", "cpuset.cpus", "io.max"}) {
            put(box / file, "");
        }
        put(box / "memory.current", "4096\n");
        put(box / "memory.peak", "8192\n");
        put(box / "memory.stat", "anon 1\nfile 77\nfile_mapped 3\n");
        put(box / "memory.events", "low 0\noom 5\noom_kill 2\noom_group_kill 1\n");
        put(box / "cpu.stat", "usage_usec 1500\nuser_usec 9\nnr_throttled 3\nthrottled_usec 250\n");
        put(box / "pids.current", "3\n");
        put(box / "io.stat", "8:0 rbytes=100 wbytes=10 rios=1\n8:16 rbytes=23 wbytes=5 rios=2\n");
        put(box / "cgroup.procs", "12\n0\n345\n");
        fs::create_directories(box / "below");
        put(box / "below" / "cgroup.procs", "7\n");
        tree = std::make_shared<CgroupTree>(
            "polyvisor",
            find_hierarchies("9 8 0:27 / " + root.string() + " rw - cgroup2 none rw\n", "0::/\n"));
    }
    ~FakeTree() { fs::remove_all(root); }
    fs::path root, box;
    std::shared_ptr<CgroupTree> tree;
};

void test_v2_files() {
    FakeTree fake;
    CHECK_EQ(Cgroup::names(*fake.tree).size(), 1u);
    CHECK_THROWS(Cgroup::open(fake.tree, "none"), HostError);
    CHECK_THROWS(Cgroup::open(fake.tree, "../box"), ConfigError);
    Cgroup cgroup = Cgroup::open(fake.tree, "box");
    CHECK_EQ(cgroup.unified(), fake.box.string());

    CgroupLimits limits;
    limits.memory = 4 << 20;
    limits.cpu_quota = 20'000;
    limits.cpu_burst = 5'000;
    limits.pids = 9;
    limits.cpuset = "1";
    cgroup.change(limits);
    CHECK_EQ(get(fake.box / "memory.max"), "4194304");
    CHECK_EQ(get(fake.box / "memory.swap.max"), "0");
    CHECK_EQ(get(fake.box / "cpu.max"), "20000 100000");
    CHECK_EQ(get(fake.box / "cpu.max.burst"), "5000");
    CHECK_EQ(get(fake.box / "pids.max"), "9");
    CHECK_EQ(get(fake.box / "cpuset.cpus"), "1");

    CgroupStats stats = cgroup.stats();
    CHECK_EQ(*stats.memory, 4096u);
    CHECK_EQ(*stats.memory_peak, 8192u);
    CHECK_EQ(*stats.memory_cache, 77u);
    CHECK_EQ(*stats.oom_kills, 2u);
    CHECK_EQ(*stats.cpu_us, 1500u);
    CHECK_EQ(*stats.throttled_us, 250u);
    CHECK_EQ(*stats.pids, 3u);
    CHECK_EQ(*stats.io_read, 123u);
    CHECK_EQ(*stats.io_written, 15u);
    CHECK(cgroup.processes() == (std::vector<pid_t>{7, 12, 345}));

    // A kernel without a file that a limit needs says so; what nobody asked for may be missing.
    fs::remove(fake.box / "cpu.max.burst");
    CHECK_THROWS(cgroup.change(limits), LimitUnavailable);
    limits.cpu_burst = 0;
    cgroup.change(limits);
}

void test_v2_enables() {
    FakeTree fake;
    CHECK(fake.tree->with("memory").v2);
    CHECK_EQ(get(fake.root / "cgroup.subtree_control"), "+memory");
    CHECK_EQ(get(fake.root / "polyvisor" / "cgroup.subtree_control"), "+memory");
    CHECK(fake.tree->with("devices").v2);  // BPF
    CHECK_THROWS(fake.tree->with("rdma"), LimitUnavailable);

    FakeTree poor;  // as in a hybrid host's v2 tree
    put(poor.root / "cgroup.controllers", "\n");
    CgroupLimits limits;
    limits.pids = 3;
    CHECK_THROWS(Cgroup::create(poor.tree, "new", limits, false), LimitUnavailable);
    CHECK(!fs::exists(poor.root / "polyvisor" / "new"));  // nothing is left of the attempt
    CgroupTree nothing("polyvisor", {});
    CHECK_THROWS(nothing.with("memory"), LimitUnavailable);
}

void test_device_program() {
    CHECK_EQ(device_program({}).size(), 8u);  // loads, then refuses
    for (const auto& code : {device_program({{'c', 1, 3, true, true, false}}),
                             device_program({{'b', {}, {}, true, true, true}})}) {
        for (std::size_t at = 0; at < code.size(); ++at) {  // no jump leaves it
            CHECK(at + static_cast<std::size_t>(code[at].off) < code.size() ||
                  (code[at].code & 7) == BPF_LDX);
        }
    }
}

}  // namespace

int main() {
    test_settings();
    test_weights();
    test_hierarchies();
    test_v2_files();
    test_v2_enables();
    test_device_program();
    return pvtest::finish("test_cgroup");
}
