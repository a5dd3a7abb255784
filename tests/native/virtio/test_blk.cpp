// virtio-blk against an array of bytes: random requests in random chains, several at a time, on
// every kind of store, channel and ring.
#include "virtio/blk.hpp"

#include <algorithm>
#include <map>

#include "block/open.hpp"
#include "block/qemu_nbd.hpp"
#include "check.hpp"
#include "disk_guest.hpp"
#include "random.hpp"
#include "rings.hpp"

using namespace pvtest;

namespace {

constexpr u64 kSize = 1 << 20;
const u64 kRounds = environment_number("PV_ROUNDS", 150);

std::vector<u8> random_bytes(Random& random, std::size_t size) {
    std::vector<u8> bytes(size);
    for (std::size_t i = 0; i < size; i += 8) {
        const u64 value = random.next();
        std::memcpy(&bytes[i], &value, std::min<std::size_t>(8, size - i));
    }
    return bytes;
}

void append(std::vector<u8>& to, std::span<const u8> bytes) {
    const std::size_t before = to.size();
    to.resize(before + bytes.size());
    std::memcpy(to.data() + before, bytes.data(), bytes.size());
}

struct Pending {
    u32 type = 0;
    u64 offset = 0, size = 0;
    u64 answer = 0, status = 0;  // where the device writes
    std::vector<FakeDriver::Segment> parts;
    std::vector<u8> out;  // what the device reads
};

// Cuts [gpa, gpa+size) into segments.
void cut(Random& random, u64 gpa, u64 size, bool write, std::vector<FakeDriver::Segment>& into) {
    while (size != 0) {
        u64 piece = random.one_in(3) ? size : 1 + random.below(static_cast<u32>(size));
        if (random.one_in(2)) piece = std::min(size, align_up(piece, 512));
        into.push_back({gpa, static_cast<u32>(piece), write});
        gpa += piece;
        size -= piece;
    }
}

// A request on a part of the disk that no other of the batch touches.
Pending make_request(Random& random, FakeGuest& guest, u64 from, u64 to) {
    Pending pending;
    pending.type = random.pick<u32>({Blk::kIn, Blk::kIn, Blk::kIn, Blk::kOut, Blk::kOut, Blk::kOut,
                                     Blk::kFlush, Blk::kWriteZeroes, Blk::kDiscard});
    const u64 sectors = (to - from) / 512;
    u64 first = random.below(static_cast<u32>(sectors));
    u64 count = 1 + random.below(static_cast<u32>(std::min<u64>(sectors - first, 64)));
    if (random.one_in(2)) {  // as a file system does
        first &= ~u64{7};
        count = std::min(align_up(count, 8), sectors - first);
    }
    pending.offset = from + first * 512;
    pending.size = count * 512;
    const DiskHeader header{pending.type, 0, pending.offset / 512};
    std::vector<u8>& out = pending.out;
    append(out, bytes_of(header));
    u64 in = 1;
    if (pending.type == Blk::kOut) {
        append(out, random_bytes(random, pending.size));
    } else if (pending.type == Blk::kIn) {
        in += pending.size;
    } else if (pending.type != Blk::kFlush) {
        const u32 unmap = pending.type == Blk::kWriteZeroes ? random.below(2) : 0;
        struct {
            u64 sector;
            u32 sectors, flags;
        } segment{pending.offset / 512, static_cast<u32>(count), unmap};
        append(out, bytes_of(segment));
    }
    // Data sometimes where a page begins, for O_DIRECT.
    const bool page = random.one_in(2);
    auto place = [&](u64 size, u64 header_size) {
        const u64 at = guest.buffer(static_cast<u32>(size + 2 * kPageSize));
        return page ? align_up(at + header_size, kPageSize) - header_size : at + random.below(512);
    };
    const u64 request = place(out.size(), sizeof header);
    pending.answer = place(in, 0);
    pending.status = pending.answer + in - 1;
    if (random.one_in(3)) {
        cut(random, request, out.size(), false, pending.parts);
    } else {
        pending.parts.push_back({request, sizeof header, false});
        if (out.size() > sizeof header) {
            cut(random, request + sizeof header, out.size() - sizeof header, false, pending.parts);
        }
    }
    if (in > 1 && random.one_in(2)) {
        cut(random, pending.answer, in - 1, true, pending.parts);
        pending.parts.push_back({pending.status, 1, true});
    } else {
        cut(random, pending.answer, in, true, pending.parts);
    }
    return pending;
}

std::vector<u8> read_all(block::Store& store) {
    std::vector<u8> bytes(store.info().size);
    iovec part{bytes.data(), bytes.size()};
    block::Request request{.size = bytes.size(), .buffers = {&part, 1}};
    CHECK_EQ(store.perform(request), 0);
    return bytes;
}

void run(const char* what, Host& host, Blk& device, u64 features, u64 seed, u64 rounds) {
    Random random(seed);
    std::vector<u8> model = read_all(device.store());
    bool right = true;
    std::vector<bool> doubtful(kSize / 512, false);  // sectors that were discarded
    {
        FakeGuest guest(device, host.memory, {.features = features, .queue_size = 128});
        for (u64 round = 0; round < rounds; ++round) {
            guest.free_buffers();
            const u32 count = 1 + random.below(8);
            const unsigned queue = random.below(device.queues());
            std::map<u16, Pending> batch;
            for (u32 i = 0; i < count; ++i) {
                const u64 share = align_down(kSize / count, 512);
                Pending pending = make_request(random, guest, i * share, (i + 1) * share);
                if (pending.parts.size() > 60) continue;
                const u64 request = pending.parts.front().gpa;
                host.memory.write(Gpa(request), pending.out);
                host.memory.store<u8>(Gpa(pending.status), 0xee);
                u64 table = 0;
                if ((guest.features() & kIndirectDesc) && random.one_in(2)) {
                    table = guest.buffer(static_cast<u32>(pending.parts.size() * 16));
                }
                auto id = guest.driver(queue).add(pending.parts, table);
                if (!id) break;
                batch.emplace(*id, std::move(pending));
                if (random.one_in(4)) guest.kick(queue);
            }
            guest.kick(queue);
            while (!batch.empty()) {
                auto used = guest.wait(queue);
                if (!used) {
                    fail(__FILE__, __LINE__,
                         std::string(what) + ": no answer: " + device.failure());
                    return;
                }
                CHECK_EQ(batch.count(used->id), std::size_t{1});
                Pending done = std::move(batch[used->id]);
                batch.erase(used->id);
                CHECK_EQ(unsigned{host.memory.load<u8>(Gpa(done.status))}, 0u);
                const auto at = model.begin() + static_cast<s64>(done.offset);
                const u64 first = done.offset / 512, last = first + done.size / 512;
                if (done.type == Blk::kIn) {
                    const auto got = guest.bytes(done.answer, static_cast<u32>(done.size));
                    for (u64 sector = first; sector < last; ++sector) {
                        const u64 skip = (sector - first) * 512;
                        const bool same = std::equal(got.begin() + static_cast<s64>(skip),
                                                     got.begin() + static_cast<s64>(skip) + 512,
                                                     at + static_cast<s64>(skip));
                        right = right && (same || doubtful[sector]);
                    }
                } else if (done.type == Blk::kOut) {
                    std::copy(done.out.begin() + sizeof(DiskHeader), done.out.end(), at);
                    std::fill(doubtful.begin() + static_cast<s64>(first),
                              doubtful.begin() + static_cast<s64>(last), false);
                } else if (done.type == Blk::kWriteZeroes) {
                    std::fill(at, at + static_cast<s64>(done.size), u8{0});
                    std::fill(doubtful.begin() + static_cast<s64>(first),
                              doubtful.begin() + static_cast<s64>(last), false);
                } else if (done.type == Blk::kDiscard) {
                    std::fill(doubtful.begin() + static_cast<s64>(first),
                              doubtful.begin() + static_cast<s64>(last), true);
                }
            }
        }
        CHECK_EQ(device.failure(), std::string());
        if (!right) fail(__FILE__, __LINE__, std::string(what) + ": read something else");
    }
    const std::vector<u8> file = read_all(device.store());
    for (u64 sector = 0; sector < kSize / 512; ++sector) {
        if (doubtful[sector]) continue;
        const s64 at = static_cast<s64>(sector * 512);
        if (std::equal(file.begin() + at, file.begin() + at + 512, model.begin() + at)) continue;
        fail(__FILE__, __LINE__,
             std::string(what) + ": the image differs in sector " + std::to_string(sector));
        return;
    }
}

using Maker = std::shared_ptr<block::Store> (*)(const std::string& path);

template <block::Cache cache>
std::shared_ptr<block::Store> file(const std::string& path) {
    return std::make_shared<block::FileStore>(path, block::FileStore::Options{.cache = cache});
}
std::shared_ptr<block::Store> snapshot(const std::string& path) {
    return block::open_image(path, {.snapshot = true});
}
// QEMU's own server, of a raw file here: what a qcow2 image is to us.
std::shared_ptr<block::Store> nbd(const std::string& path) {
    return block::open_with_qemu_nbd(path, "raw", {});
}

void random_requests() {
    using enum block::Io;
    const struct {
        const char* name;
        Maker make;
        block::Io io = kAuto;
        unsigned queues = 1;
        u64 share = 1;  // of the rounds
        bool real_disk = false;
    } ways[] = {
        {"io_uring", file<block::Cache::kWriteback>},
        {"io_uring, 3 queues", file<block::Cache::kWriteback>, kAuto, 3},
        {"threads", file<block::Cache::kWriteback>, kThreads, 2},
        {"io_uring, direct", file<block::Cache::kNone>, kAuto, 1, 15, true},
        {"threads, direct", file<block::Cache::kNone>, kThreads, 1, 15, true},
        {"unsafe", file<block::Cache::kUnsafe>},
        {"snapshot", snapshot},
        {"nbd", nbd, kAuto, 1, 5},
    };
    const bool have_nbd = std::system("command -v qemu-nbd >/dev/null") == 0;
    if (!have_nbd) std::fprintf(stderr, "no qemu-nbd here: not tested with it\n");
    Random random(1);
    u64 seed = 0;
    for (const auto& way : ways) {
        if (way.make == nbd && !have_nbd) continue;
        for (const Kind& kind : kKinds) {
            Host host;
            Folder folder(way.real_disk);
            const std::vector<u8> before = random_bytes(random, kSize);
            const std::string path = folder.file("disk", before);
            {
                auto store = way.make(path);
                Blk device(host.environment(),
                           {.store = store, .io = way.io, .queues = way.queues});
                device.offer_packed(true);
                const std::string what = std::string(way.name) + ", " + kind.name;
                // Half of the drivers know the write cache, the others have none.
                const u64 cache = Blk::kFlushFeature | Blk::kConfigWce;
                const u64 own = seed % 2 ? 0xffffff : 0xffffff & ~cache;
                run(what.c_str(), host, device, kind.features | own, ++seed, kRounds / way.share);
                if (way.make != snapshot) CHECK(contents_of(path) == read_all(*store));
            }
            if (way.make == snapshot) CHECK(contents_of(path) == before);
        }
    }
}

}  // namespace

int main() {
    random_requests();
    return finish("test_blk");
}
