// Rings of every kind, one step at a time, against a model: what the driver offers is what the
// device pops, in that order, bit for bit; what the device writes and gives back, in whatever
// order, is what the driver gets.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <deque>
#include <map>

#include "check.hpp"
#include "random.hpp"
#include "rings.hpp"

using namespace pvtest;

namespace {

const u64 kSeed = environment_number(
    "PV_SEED", static_cast<u64>(std::chrono::steady_clock::now().time_since_epoch().count()));
const u64 kSteps = environment_number("PV_STEPS", 60'000);

struct Offer {
    u16 id = 0;
    std::vector<FakeDriver::Segment> segments;
    u32 readable = 0, writable = 0;
    u64 number = 0;   // names its contents
    u32 written = 0;  // by the device
};

u8 content(u64 number, u32 at) {
    return static_cast<u8>((number * 0x9e3779b97f4a7c15 >> 32) + at * 7);
}

class Model {
  public:
    Model(const Kind& kind, u32 size, u64 seed)
        : kind_(kind),
          rings_(kind.features, size),
          driver_(rings_.memory, rings_.config),
          queue_(rings_.memory),
          random_(seed) {
        CHECK(queue_.configure(rings_.config));
    }

    void step() {
        switch (random_.below(8)) {
            case 0:
            case 1:
                offer();
                break;
            case 2:
                driver_.publish();
                published_ = offered_;
                break;
            case 3:
            case 4:
                pop();
                break;
            case 5:
                give_back();
                break;
            case 6:
                queue_.publish();
                visible_ = given_;
                break;
            case 7:
                random_.one_in(64) ? move() : collect();
                break;
        }
        CHECK(queue_.error().empty());
    }

    void finish() {
        driver_.publish();
        published_ = offered_;
        while (popped_ < offered_) pop();
        while (!held_.empty()) give_back();
        queue_.publish();
        visible_ = given_;
        while (collected_ < offered_) collect();
        CHECK_EQ(driver_.outstanding(), 0u);
        CHECK_EQ(driver_.free(), rings_.config.size);
        CHECK(!queue_.available());
        CHECK(!driver_.get().has_value());
    }
    u64 collected() const { return collected_; }

  private:
    void offer() {
        Offer offer;
        offer.number = offered_;
        const u32 most = std::min<u32>(rings_.config.size, 9);
        const u32 count = 1 + random_.below(most);
        const u32 readable = random_.below(count + 1);
        u64 at = Rings::kData + (offered_ % 1500) * 0x8000;
        for (u32 n = 0; n < count; ++n) {
            const u32 bytes = 1 + random_.below(700);
            at += random_.below(64);
            offer.segments.push_back({at, bytes, n >= readable});
            (n < readable ? offer.readable : offer.writable) += bytes;
            at += bytes;
        }
        const bool indirect = (kind_.features & kIndirectDesc) && random_.below(2);
        u32 position = 0;
        for (const auto& segment : offer.segments) {
            std::vector<u8> bytes(segment.size, 0);
            if (!segment.write) {
                for (u8& byte : bytes) byte = content(offer.number, position++);
            }
            rings_.memory.write(Gpa(segment.gpa), bytes);
        }
        auto id =
            driver_.add(offer.segments, indirect ? Rings::kTables + (offered_ % 1500) * 256 : 0);
        const u32 slots = indirect ? 1 : count;
        CHECK_EQ(id.has_value(), slots <= free_);
        if (!id) return;
        free_ -= slots;
        slots_[*id] = slots;
        offer.id = *id;
        waiting_.push_back(std::move(offer));
        ++offered_;
    }

    void pop() {
        Chain& chain = chain_;
        CHECK_EQ(queue_.available(), popped_ < published_);
        const bool found = queue_.pop(chain);
        CHECK_EQ(found, popped_ < published_);
        if (!found) return;
        if (random_.one_in(8)) {  // not now
            queue_.unpop(chain);
            CHECK(queue_.pop(chain));
        }
        ++popped_;
        Offer offer = std::move(waiting_.front());
        waiting_.pop_front();
        CHECK_EQ(chain.id(), offer.id);
        CHECK_EQ(chain.readable_bytes(), offer.readable);
        CHECK_EQ(chain.writable_bytes(), offer.writable);
        std::vector<u8> read(offer.readable + 5);
        CHECK_EQ(chain.read(0, read), offer.readable);
        bool same = true;
        for (u32 n = 0; n < offer.readable; ++n) same &= read[n] == content(offer.number, n);
        CHECK(same);
        offer.written = offer.writable == 0 ? 0 : random_.below(offer.writable + 1);
        std::vector<u8> answer(offer.written);
        for (u32 n = 0; n < offer.written; ++n) answer[n] = content(~offer.number, n);
        const u32 half = offer.written / 2;
        CHECK_EQ(chain.write(0, std::span(answer).first(half)), half);
        CHECK_EQ(chain.write(half, std::span(answer).subspan(half)), offer.written - half);
        held_.push_back({std::move(offer), Chain()});
        std::swap(held_.back().chain, chain);
    }

    void give_back() {
        if (held_.empty()) return;
        const bool in_order = kind_.features & kInOrder;
        const std::size_t which = in_order ? 0 : random_.below(static_cast<u32>(held_.size()));
        Held held = std::move(held_[which]);
        held_.erase(held_.begin() + static_cast<long>(which));
        queue_.push(held.chain, held.offer.written);
        back_.push_back(std::move(held.offer));
        ++given_;
    }

    void collect() {
        auto used = driver_.get();
        CHECK_EQ(used.has_value(), collected_ < visible_);
        if (!used) return;
        Offer offer = std::move(back_.front());
        back_.pop_front();
        ++collected_;
        free_ += std::exchange(slots_[offer.id], 0);
        CHECK_EQ(used->id, offer.id);
        CHECK_EQ(used->written, offer.written);
        u32 position = 0;
        bool same = true;
        for (const auto& segment : offer.segments) {
            if (!segment.write) continue;
            std::vector<u8> bytes(segment.size);
            rings_.memory.read(Gpa(segment.gpa), bytes);
            for (u8 byte : bytes) {
                same &= byte == (position < offer.written ? content(~offer.number, position) : 0);
                ++position;
            }
        }
        CHECK(same);
    }

    // To another machine, between any two steps that leave nothing half done.
    void move() {
        if (!held_.empty() || given_ != visible_) return;
        const Queue::Positions at = queue_.positions();
        Queue other(rings_.memory);
        CHECK(other.configure(rings_.config));
        CHECK(other.set_positions(at));
        CHECK(other.positions() == at);
        queue_.reset();
        CHECK(!queue_.pop(chain_));
        CHECK(queue_.configure(rings_.config));
        CHECK(queue_.set_positions(at));
    }

    struct Held {
        Offer offer;
        Chain chain;
    };
    Kind kind_;
    Rings rings_;
    FakeDriver driver_;
    Queue queue_;
    Random random_;
    Chain chain_;
    std::deque<Offer> waiting_, back_;
    std::vector<Held> held_;
    std::map<u16, u32> slots_;
    u32 free_ = rings_.config.size;
    u64 offered_ = 0, published_ = 0, popped_ = 0, given_ = 0, visible_ = 0, collected_ = 0;
};

}  // namespace

int main() {
    u64 chains = 0;
    for (const Kind& kind : kKinds) {
        for (u32 size : {1u, 2u, 8u, 64u, 256u}) {
            Model model(kind, size, kSeed + size);
            for (u64 n = 0; n < kSteps / 5; ++n) model.step();
            model.finish();
            CHECK(model.collected() > 100);
            chains += model.collected();
        }
        if (kind.features & kRingPacked) {  // of any size
            Model model(kind, 37, kSeed);
            for (u64 n = 0; n < kSteps / 5; ++n) model.step();
            model.finish();
            chains += model.collected();
        }
    }
    std::printf("%llu chains, seed %llu\n", static_cast<unsigned long long>(chains),
                static_cast<unsigned long long>(kSeed));
    return finish("test_virtio_queue");
}
