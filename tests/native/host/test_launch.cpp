// Launching in new namespaces, as whoever runs the tests; what a host forbids is a skip.
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>

#include "base/error.hpp"
#include "check.hpp"
#include "host/launch.hpp"

using namespace polyvisor;
using namespace polyvisor::host;
using namespace std::chrono_literals;

namespace {

LaunchSpec spec_of(std::vector<std::string> argv) {
    LaunchSpec spec;
    spec.argv = std::move(argv);
    spec.env = {"PATH=/usr/bin:/bin"};
    spec.read_only_root = true;
    spec.uid = ::geteuid();
    spec.gid = ::getegid();
    spec.uid_map = {{spec.uid, spec.uid, 1}};
    spec.gid_map = {{spec.gid, spec.gid, 1}};
    for (const char* type : {"proc", "dev"}) {
        Mount mount;
        mount.type = type;
        mount.target = std::string("/") + type;
        spec.mounts.push_back(mount);
    }
    spec.standard[2] = 2;
    return spec;
}

/// The wait status.
int run(const LaunchSpec& spec) {
    Launched launched = launch(spec);
    launched.send();
    while (!launched.started(100ms)) {
    }
    for (int i = 0; i < 200; ++i) {
        if (const auto status = launched.wait(100ms)) return *status;
    }
    return -1;
}

void test_status() {
    CHECK_EQ(run(spec_of({"/bin/sh", "-c", "exit 7"})), 7 << 8);
    CHECK_EQ(run(spec_of({"true"})), 0);
    CHECK_EQ(run(spec_of({"sh", "-c", "kill -9 $$"})), SIGKILL);
    // PID 1 reaps the orphan and ends with the program.
    CHECK_EQ(run(spec_of({"sh", "-c", "(sleep 100 &); test $$ -eq 2"})), 0);
}

void test_without_init() {
    LaunchSpec spec = spec_of({"sh", "-c", "test $$ -eq 1 && exit 3"});
    spec.init = false;
    CHECK_EQ(run(spec), 3 << 8);
}

void test_failures() {
    try {
        run(spec_of({"/nonexistent"}));
        CHECK(false);
    } catch (const HostError& error) {
        CHECK_EQ(error.code, ENOENT);
        CHECK_EQ(error.path, std::string("/nonexistent"));
    }
    LaunchSpec spec = spec_of({"true"});
    spec.uid_map.clear();
    CHECK_THROWS(launch(spec), ConfigError);
}

void test_kill_and_end() {
    Launched launched = launch(spec_of({"sleep", "1000"}));
    const int pid = launched.pid();
    launched.send();
    while (!launched.started(100ms)) {
    }
    CHECK(!launched.wait(10ms).has_value());
    launched.kill();
    CHECK_EQ(launched.wait(0ms).value_or(-1), SIGKILL);
    CHECK_EQ(::kill(pid, 0), -1);
    // One that was never told to go is no more after its object.
    const int other = launch(spec_of({"true"})).pid();
    CHECK_EQ(::kill(other, 0), -1);
}

}  // namespace

int main() {
    try {
        launch(spec_of({"true"}));
    } catch (const HostError& error) {
        std::printf("no namespaces here: %s\n", error.what());
        return 77;
    }
    test_status();
    test_without_init();
    test_failures();
    test_kill_and_end();
    return pvtest::finish("launch");
}
