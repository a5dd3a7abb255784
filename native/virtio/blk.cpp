#include "virtio/blk.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/error.hpp"

namespace polyvisor::virtio {

using block::kSectorSize;
using block::Operation;
using block::Request;

// 5.2.4
struct Blk::ConfigSpace {
    u64 capacity;  // in sectors
    u32 size_max, seg_max;
    u16 cylinders;
    u8 heads, sectors;
    u32 blk_size;
    u8 physical_block_exp, alignment_offset;
    u16 min_io_size;
    u32 opt_io_size;
    u8 writeback, unused0;
    u16 num_queues;
    u32 max_discard_sectors, max_discard_seg, discard_sector_alignment;
    u32 max_write_zeroes_sectors, max_write_zeroes_seg;
    u8 write_zeroes_may_unmap, unused1[3];
};

// 5.2.6
struct Blk::Header {
    u32 type, reserved;
    u64 sector;
};
struct Blk::Segment {
    u64 sector;
    u32 sectors, flags;  // bit 0: unmap
};

namespace {

constexpr u32 kSegMaxValue = 254;           // with header and status: a whole table of Linux's
constexpr u32 kMaxRangeSectors = 1u << 22;  // of one discard: 2 GiB
constexpr u32 kUnmap = 1;
constexpr u32 kWritebackOffset = 32;
constexpr unsigned kKinds = 5, kMostQueues = 64;

// Written by one thread at a time, read by any.
void add(std::atomic<u64>& counter, u64 amount) {
    counter.store(counter.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed);
}

}  // namespace

struct Blk::Slot : Request {
    Chain chain;
    std::vector<iovec> parts;
    u8* status = nullptr;      // in guest memory
    u64 first = 0, bytes = 0;  // of the whole request, for counting and messages
    bool known = false;        // its kind is
};

struct Blk::Lane {
    struct Counts {
        std::atomic<u64> requests{0}, bytes{0}, errors{0};
    };

    Slot* free_slot() {
        if (free.empty() && slots.size() < kQueueSize) {
            slots.push_back(std::make_unique<Slot>());
            free.push_back(slots.back().get());
        }
        return free.empty() ? nullptr : free.back();
    }

    unsigned index = 0;
    std::vector<std::unique_ptr<Slot>> slots;
    std::vector<Slot*> free;
    unsigned in_flight = 0;
    std::array<Counts, kKinds> counts;
    std::atomic<u64> other{0};
    std::unique_ptr<block::Channel> channel;
};

Description Blk::describe(const Config& config) {
    static_assert(offsetof(ConfigSpace, writeback) == kWritebackOffset);
    static_assert(sizeof(ConfigSpace) == 64 && offsetof(ConfigSpace, unused1) == 57);
    if (config.queues < 1 || config.queues > kMostQueues) {
        throw ConfigError("queues",
                          "a disk has 1 to 64 queues, not " + std::to_string(config.queues));
    }
    if (config.serial.size() > kIdBytes) {
        throw ConfigError("serial", "the serial number '" + config.serial + "' has " +
                                        std::to_string(config.serial.size()) +
                                        " bytes; a disk's has up to 20");
    }
    u64 features = kSegMax | kBlkSize | kTopology | kMq;
    if (config.store->info().read_only) {
        features |= kReadOnly;
    } else {
        features |= kFlushFeature | kConfigWce | kDiscardFeature | kWriteZeroesFeature;
    }
    return {.type = DeviceType::kBlock,
            .name = "virtio-blk",
            .features = features,
            .queue_sizes = std::vector<u16>(config.queues, kQueueSize),
            .config_size = 60,
            .pci_class = 0x010000};
}

Blk::Blk(const Environment& environment, const Config& config)
    : Device(environment, describe(config)),
      store_(config.store),
      serial_(config.serial),
      synchronous_(config.synchronous) {
    const block::Store::Info info = store_->info();
    read_only_ = info.read_only;
    if (info.size == 0) {
        throw ConfigError("path", "disk '" + store_->name() + "' is empty; give it a size first");
    }
    capacity_ = info.size;
    ConfigSpace space{};
    space.capacity = info.size / kSectorSize;
    space.seg_max = kSegMaxValue;
    space.blk_size = info.block_size;
    const u32 ratio = std::max(info.physical_block_size / info.block_size, 1u);
    space.physical_block_exp = static_cast<u8>(std::bit_width(ratio) - 1);
    space.min_io_size = static_cast<u16>(ratio);
    space.writeback = 1;
    space.num_queues = static_cast<u16>(config.queues);
    space.max_discard_sectors = space.max_write_zeroes_sectors = kMaxRangeSectors;
    space.max_discard_seg = space.max_write_zeroes_seg = 1;
    space.discard_sector_alignment = info.physical_block_size / kSectorSize;
    space.write_zeroes_may_unmap = 1;
    set_config(0, std::span(reinterpret_cast<const u8*>(&space), description().config_size));
    if (config.rates.limited()) {
        limit_ = std::make_unique<block::RateLimit>(loop(), config.rates, [this] {
            for (unsigned i = 0; i < queues(); ++i) kick(i);
        });
    }
    for (unsigned i = 0; i < config.queues; ++i) {
        auto lane = std::make_unique<Lane>();
        lane->index = i;
        lane->channel =
            block::make_channel(*store_, loop(), config.io, [this, i] { completed(i); });
        lanes_.push_back(std::move(lane));
    }
}

Blk::~Blk() {
    limit_.reset();  // nothing is begun any more
    quiet_ = true;
    for (auto& lane : lanes_) {
        Held held = hold(lane->index);
        drain_lane(*lane, held ? &held.queue() : nullptr);
    }
    lanes_.clear();  // no thread calls completed() after this
}

// --- Requests ------------------------------------------------------------------------------------

void Blk::serve(unsigned index, Queue& queue) {
    Lane& lane = *lanes_[index];
    while (true) {
        queue.disable_notify();
        const Taken taken = take(lane, queue);
        lane.channel->commit();
        reap(lane, queue);
        if (synchronous_) drain_lane(lane, &queue);
        // A full lane, or one whose bucket is empty, is served again by completed() and the limit.
        if (taken == Taken::kThrottled) return;
        if (taken == Taken::kFull) {
            if (lane.free_slot() == nullptr) return;
        } else if (!queue.enable_notify()) {
            return;
        }
    }
}

Blk::Taken Blk::take(Lane& lane, Queue& queue) {
    while (Slot* slot = lane.free_slot()) {
        if (!queue.pop(slot->chain)) return Taken::kAll;
        lane.free.pop_back();
        if (!begin(lane, queue, *slot)) {
            queue.unpop(slot->chain);
            lane.free.push_back(slot);
            return Taken::kThrottled;
        }
    }
    return Taken::kFull;
}

// False: the rate limit holds it back.
bool Blk::begin(Lane& lane, Queue& queue, Slot& slot) {
    const auto writable = slot.chain.writable();
    if (writable.empty()) {
        fail("queue " + std::to_string(lane.index) + ": a request without a byte for its status");
        lane.free.push_back(&slot);
        return true;
    }
    slot.status = writable.back().data + writable.back().size - 1;
    if (const std::optional<u8> answer = prepare(slot)) {
        finish(lane, queue, slot, *answer);
        return true;
    }
    if (limit_ && !limit_->admit(slot.bytes)) return false;
    if (store_->try_now(slot)) {
        finish(lane, queue, slot, kOk);
    } else {
        ++lane.in_flight;
        lane.channel->submit(slot);
    }
    return true;
}

// Makes the store's request of the driver's; an answer when there is nothing to ask the store.
std::optional<u8> Blk::prepare(Slot& slot) {
    const Chain& chain = slot.chain;
    static_cast<Request&>(slot) = {};
    slot.first = slot.bytes = 0;
    slot.known = false;
    Header header;
    if (chain.read(0, {reinterpret_cast<u8*>(&header), sizeof header}) != sizeof header) {
        return kIoError;
    }
    const u32 in = chain.writable_bytes() - 1;
    switch (header.type) {
        case kIn:
            return prepare_transfer(slot, Operation::kRead, header.sector);
        case kOut:
            return prepare_transfer(slot, Operation::kWrite, header.sector);
        case kDiscard:
            return prepare_range(slot, Operation::kDiscard);
        case kWriteZeroes:
            return prepare_range(slot, Operation::kWriteZeroes);
        case kFlush:
            slot.known = true;
            slot.operation = Operation::kFlush;
            if (read_only_) return kUnsupported;
            return std::nullopt;
        case kGetId: {
            std::array<u8, kIdBytes> id{};
            std::copy(serial_.begin(), serial_.end(), id.begin());
            chain.write(0, std::span(id).first(std::min(in, kIdBytes)));
            return kOk;
        }
        default:
            return kUnsupported;
    }
}

std::optional<u8> Blk::prepare_transfer(Slot& slot, Operation operation, u64 sector) {
    const bool read = operation == Operation::kRead;
    const u64 size =
        read ? slot.chain.writable_bytes() - 1 : slot.chain.readable_bytes() - sizeof(Header);
    slot.known = true;
    slot.operation = operation;
    if (size == 0 || !in_range(sector, size) || (!read && read_only_)) return kIoError;
    slot.first = slot.offset = sector * kSectorSize;
    slot.bytes = slot.size = size;
    slot.durable = !read && !writeback_.load(std::memory_order_relaxed);
    slot.parts.clear();
    u64 skip = read ? 0 : sizeof(Header), left = size;
    for (const Buffer& buffer : read ? slot.chain.writable() : slot.chain.readable()) {
        const u64 skipped = std::min<u64>(skip, buffer.size);
        const u64 here = std::min<u64>(buffer.size - skipped, left);
        if (here != 0) slot.parts.push_back({buffer.data + skipped, here});
        skip -= skipped;
        left -= here;
    }
    slot.buffers = slot.parts;
    return std::nullopt;
}

std::optional<u8> Blk::prepare_range(Slot& slot, Operation operation) {
    const bool discard = operation == Operation::kDiscard;
    slot.known = true;
    slot.operation = operation;
    Segment segment;
    if (read_only_) return kIoError;
    if (slot.chain.readable_bytes() != sizeof(Header) + sizeof segment) {
        return kIoError;  // max_discard_seg and max_write_zeroes_seg are 1
    }
    slot.chain.read(sizeof(Header), {reinterpret_cast<u8*>(&segment), sizeof segment});
    if (segment.flags & ~(discard ? 0 : kUnmap)) return kUnsupported;
    const u64 size = u64{segment.sectors} * kSectorSize;
    if (segment.sectors > kMaxRangeSectors || !in_range(segment.sector, size)) return kIoError;
    if (size == 0) return kOk;
    slot.first = slot.offset = segment.sector * kSectorSize;
    slot.bytes = slot.size = size;
    slot.may_unmap = (segment.flags & kUnmap) != 0;
    slot.durable = !discard && !writeback_.load(std::memory_order_relaxed);
    return std::nullopt;
}

bool Blk::in_range(u64 sector, u64 size) const {
    const u64 sectors = capacity() / kSectorSize;
    return size % kSectorSize == 0 && sector <= sectors && size / kSectorSize <= sectors - sector;
}

void Blk::reap(Lane& lane, Queue& queue) {
    while (Request* request = lane.channel->next_done()) {
        Slot& slot = static_cast<Slot&>(*request);
        --lane.in_flight;
        if (slot.error != 0) note_error(slot);
        finish(lane, queue, slot, slot.error == 0 ? kOk : kIoError);
    }
}

void Blk::finish(Lane& lane, Queue& queue, Slot& slot, u8 answer) {
    *slot.status = answer;
    if (slot.known) {
        Lane::Counts& counts = lane.counts[static_cast<unsigned>(slot.operation)];
        add(counts.requests, 1);
        answer == kOk ? add(counts.bytes, slot.bytes) : add(counts.errors, 1);
    } else {
        add(lane.other, 1);
    }
    // All of what the device may write: the status is behind data that it may not have.
    queue.push(slot.chain, slot.chain.writable_bytes());
    lane.free.push_back(&slot);
}

void Blk::note_error(const Slot& slot) {
    if (log() == nullptr) return;
    log()->note("virtio-blk", "disk '" + store_->name() + "': " + block::name_of(slot.operation) +
                                  " of " + std::to_string(slot.bytes) + " bytes at " +
                                  std::to_string(slot.first) +
                                  " failed: " + std::strerror(slot.error));
}

void Blk::completed(unsigned index) {
    Held held = hold(index);
    if (!held) return;  // stop() or quiesce() sees to it
    reap(*lanes_[index], held.queue());
    if (!quiet_.load(std::memory_order_acquire)) serve(index, held.queue());
}

// With the queue's mutex, or after hold() fails for all others. Without a queue, what completes is
// forgotten.
void Blk::drain_lane(Lane& lane, Queue* queue) {
    while (lane.in_flight != 0) {
        if (queue != nullptr) {
            reap(lane, *queue);
        } else {
            while (Request* request = lane.channel->next_done()) {
                --lane.in_flight;
                lane.free.push_back(static_cast<Slot*>(request));
            }
        }
        if (lane.in_flight != 0) lane.channel->wait();
    }
}

// --- The driver and the machine ------------------------------------------------------------------

// (5.2.5.1: without a flush, a driver that may choose begins without a cache.)
bool Blk::accept(u64 features) {
    set_config(kWritebackOffset, u8{(features & kFlushFeature) != 0});
    return true;
}

void Blk::start(u64) {
    update_writeback();
}

void Blk::update_writeback() {
    const bool wanted = has(kConfigWce) ? config<u8>(kWritebackOffset) != 0 : has(kFlushFeature);
    writeback_.store(wanted, std::memory_order_relaxed);
}

void Blk::stop() {
    for (auto& lane : lanes_) drain_lane(*lane, nullptr);
}

void Blk::stop_queue(unsigned index) {
    drain_lane(*lanes_[index], nullptr);
}

void Blk::quiesce() {
    quiet_.store(true, std::memory_order_release);
    for (auto& lane : lanes_) {
        Held held = hold(lane->index);
        drain_lane(*lane, held ? &held.queue() : nullptr);
    }
}

void Blk::unquiesce() {
    quiet_.store(false, std::memory_order_release);
}

bool Blk::config_writable(u32 offset) const {
    return offset == kWritebackOffset && has(kConfigWce);
}

void Blk::config_written(u32, u32) {
    update_writeback();
}

// The capacity: an image of another size is another disk.
std::vector<u8> Blk::save_device() const {
    const u64 size = capacity();
    const u8* from = reinterpret_cast<const u8*>(&size);
    return {from, from + sizeof size};
}

void Blk::restore_device(std::span<const u8> state) {
    u64 size = 0;
    if (state.size() != sizeof size) {
        throw StateError("size", "the saved state of a disk is cut short");
    }
    std::memcpy(&size, state.data(), sizeof size);
    if (size != store_->info().size) {
        throw StateError("capacity", "disk '" + store_->name() + "' has " +
                                         std::to_string(store_->info().size) + " bytes, and had " +
                                         std::to_string(size) + " when the snapshot was made");
    }
    capacity_.store(size, std::memory_order_release);
}

void Blk::refresh_capacity() {
    const u64 size = store_->info().size;
    capacity_.store(size, std::memory_order_release);
    set_config(0, size / kSectorSize);
}

void Blk::resize(u64 size) {
    store_->resize(size);
    refresh_capacity();
}

const char* Blk::io() const {
    return lanes_.front()->channel->kind();
}

Blk::Statistics Blk::statistics() const {
    std::array<Count, kKinds> sums{};
    Statistics result;
    for (const auto& lane : lanes_) {
        for (unsigned i = 0; i < kKinds; ++i) {
            sums[i].requests += lane->counts[i].requests.load(std::memory_order_relaxed);
            sums[i].bytes += lane->counts[i].bytes.load(std::memory_order_relaxed);
            sums[i].errors += lane->counts[i].errors.load(std::memory_order_relaxed);
        }
        result.other += lane->other.load(std::memory_order_relaxed);
    }
    result.read = sums[0];
    result.write = sums[1];
    result.flush = sums[2];
    result.discard = sums[3];
    result.write_zeroes = sums[4];
    return result;
}

}  // namespace polyvisor::virtio
