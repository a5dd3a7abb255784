// virtio-blk (virtio 1.2, 5.2) on a block::Store: read, write, flush, discard, write zeroes, the
// serial number; several queues; a write cache that the driver can switch off.
//
// A request is served where the driver's notification arrives: what the host's page cache has is
// back before serve() returns. All others of one notification go out together, and are given back
// from the thread on which they complete. A request that the rate limit holds back stays in the
// ring.
#pragma once

#include <memory>
#include <optional>

#include "block/channel.hpp"
#include "block/rate_limit.hpp"
#include "block/store.hpp"
#include "virtio/device.hpp"

namespace polyvisor::virtio {

class Blk final : public Device {
  public:
    /// Feature bits (5.2.3).
    enum Feature : u64 {
        kSegMax = bit(2),
        kReadOnly = bit(5),
        kBlkSize = bit(6),
        kFlushFeature = bit(9),
        kTopology = bit(10),
        kConfigWce = bit(11),
        kMq = bit(12),
        kDiscardFeature = bit(13),
        kWriteZeroesFeature = bit(14),
    };
    /// Request types (5.2.6).
    enum Type : u32 {
        kIn = 0,
        kOut = 1,
        kFlush = 4,
        kGetId = 8,
        kDiscard = 11,
        kWriteZeroes = 13,
    };
    /// Answers, the last byte of a request.
    enum Answer : u8 { kOk = 0, kIoError = 1, kUnsupported = 2 };

    static constexpr u32 kIdBytes = 20;
    static constexpr u16 kQueueSize = 256;

    struct Config {
        std::shared_ptr<block::Store> store;
        block::Io io = block::Io::kAuto;
        unsigned queues = 1;  ///< 1 to 64
        std::string serial;   ///< up to 20 bytes
        block::RateLimit::Rates rates;
        /// serve() waits for what it submitted: a machine whose runs are to be repeatable.
        bool synchronous = false;
    };
    /// Throws ConfigError, HostError.
    Blk(const Environment& environment, const Config& config);
    ~Blk() override;

    struct Count {
        u64 requests = 0, bytes = 0, errors = 0;
    };
    struct Statistics {
        Count read, write, flush, discard, write_zeroes;
        u64 other = 0;  ///< GET_ID, and what was not understood
    };
    Statistics statistics() const;

    block::Store& store() { return *store_; }
    /// In bytes, as the driver knows it.
    u64 capacity() const { return capacity_.load(std::memory_order_acquire); }
    /// Takes the store's present size, and tells the driver if it is another.
    void refresh_capacity();
    /// Gives the store another size. Throws what Store::resize() does.
    void resize(u64 size);
    /// "io_uring" or "threads".
    const char* io() const;

  private:
    struct ConfigSpace;
    struct Header;
    struct Segment;
    struct Slot;
    struct Lane;
    enum class Taken { kAll, kFull, kThrottled };

    void serve(unsigned index, Queue& queue) override;
    bool accept(u64 features) override;
    void start(u64 features) override;
    void stop() override;
    void stop_queue(unsigned index) override;
    void quiesce() override;
    void unquiesce() override;
    bool config_writable(u32 offset) const override;
    void config_written(u32 offset, u32 size) override;
    std::vector<u8> save_device() const override;
    void restore_device(std::span<const u8> state) override;

    static Description describe(const Config& config);
    Taken take(Lane& lane, Queue& queue);
    bool begin(Lane& lane, Queue& queue, Slot& slot);
    std::optional<u8> prepare(Slot& slot);
    std::optional<u8> prepare_transfer(Slot& slot, block::Operation operation, u64 sector);
    std::optional<u8> prepare_range(Slot& slot, block::Operation operation);
    bool in_range(u64 sector, u64 size) const;
    void reap(Lane& lane, Queue& queue);
    void finish(Lane& lane, Queue& queue, Slot& slot, u8 answer);
    void note_error(const Slot& slot);
    void completed(unsigned index);
    void drain_lane(Lane& lane, Queue* queue);
    void update_writeback();

    std::shared_ptr<block::Store> store_;
    std::string serial_;
    bool read_only_, synchronous_;
    std::atomic<u64> capacity_{0};
    std::atomic<bool> writeback_{true};
    std::atomic<bool> quiet_{false};  // between quiesce() and unquiesce()
    std::unique_ptr<block::RateLimit> limit_;
    std::vector<std::unique_ptr<Lane>> lanes_;  // one for each queue, with its mutex
};

}  // namespace polyvisor::virtio
