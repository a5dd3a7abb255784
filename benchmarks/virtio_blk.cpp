// What a 4 KiB read costs the host outside the CPU engine: a driver without Linux, and the device
// on an image that the page cache has. Arguments: the image, "now" (as the device does it) or
// "io_uring" (without its first try), reads at a time, rounds. Prints nanoseconds of the process's
// CPU time per read.
#include <sys/resource.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "block/file_store.hpp"
#include "virtio/blk.hpp"
#include "virtio/fake_guest.hpp"

using namespace polyvisor;
using namespace polyvisor::virtio;

namespace {

double cpu_seconds() {
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    auto seconds = [](const timeval& t) { return double(t.tv_sec) + double(t.tv_usec) * 1e-6; };
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// A file that never answers at once.
class Later final : public block::Store {
  public:
    explicit Later(const std::string& path) : file_(path, {.read_only = true}) {}
    Info info() const override { return file_.info(); }
    int perform(block::Request& request) override { return file_.perform(request); }
    std::string name() const override { return file_.name(); }
    block::FileStore* file() override { return &file_; }

  private:
    block::FileStore file_;
};

}  // namespace

int main(int argc, char** argv) {
    if (argc != 5) return 2;
    const std::string path = argv[1];
    const unsigned depth = static_cast<unsigned>(std::atoi(argv[3]));
    const unsigned rounds = static_cast<unsigned>(std::atoi(argv[4]));
    GuestMemory memory;
    memory.add(Gpa(0), 16 << 20, "ram");
    Clock clock;
    EventLoop loop(clock);
    loop.start();
    std::shared_ptr<block::Store> store;
    if (std::string(argv[2]) == "now") {
        store =
            std::make_shared<block::FileStore>(path, block::FileStore::Options{.read_only = true});
    } else {
        store = std::make_shared<Later>(path);
    }
    Blk device({memory, loop}, {.store = store});
    FakeGuest guest(device, memory);
    struct {
        u32 type, reserved;
        u64 sector;
    } header{Blk::kIn, 0, 0};
    const u64 blocks = device.capacity() / 4096;
    std::vector<u64> requests, answers;
    for (unsigned i = 0; i < depth; ++i) {
        requests.push_back(guest.buffer(16));
        answers.push_back(guest.buffer(4096 + 16));
    }
    u64 random = 88172645463325252;
    const double start = cpu_seconds();
    for (unsigned round = 0; round < rounds; ++round) {
        for (unsigned i = 0; i < depth; ++i) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            header.sector = random % blocks * 8;
            memory.store(Gpa(requests[i]), header);
            guest.driver(0).add(
                {{requests[i], 16, false}, {answers[i], 4096, true}, {answers[i] + 4096, 1, true}});
        }
        guest.kick(0);
        for (unsigned i = 0; i < depth; ++i) {
            if (!guest.wait(0)) return 1;
        }
    }
    std::printf("%.0f\n", (cpu_seconds() - start) * 1e9 / rounds / depth);
    return memory.load<u8>(Gpa(answers[0] + 4096)) == Blk::kOk ? 0 : 1;
}
