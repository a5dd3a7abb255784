// Both transports, as a driver sees them: every step of a device's life, through registers only.
#include <cstring>

#include "base/error.hpp"
#include "check.hpp"
#include "random.hpp"
#include "transports.hpp"

using namespace pvtest;

namespace {

constexpr Board::Kind kBoards[] = {Board::Kind::kMmio, Board::Kind::kPciIntx,
                                   Board::Kind::kPciMsix};
constexpr u8 kReady = kAcknowledge | kDriver | kFeaturesOk;

QueueConfig place(unsigned queue, u64 features) {
    const u64 at = 0x10000 + 0x10000 * u64{queue};
    return {Echo::kSizes[queue], at, at + 0x4000, at + 0x8000, features};
}

void start(Board& board, u64 features) {
    Registers& registers = board.registers();
    registers.set_status(0);
    registers.set_status(kAcknowledge | kDriver);
    registers.set_features(features);
    registers.set_status(kReady);
    for (unsigned queue = 0; queue < 2; ++queue) registers.set_queue(queue, place(queue, features));
    registers.set_status(kReady | kDriverOk);
}

// One request through the queue: false when no answer came.
bool echoes(Board& board, FakeDriver& driver, unsigned queue, u8 byte) {
    const u64 out = 0x100000, in = 0x110000;
    board.memory.store(Gpa(out), byte);
    board.memory.store(Gpa(in), u8{0});
    driver.add({{out, 1, false}, {in, 1, true}});
    driver.enable_interrupts();
    driver.publish();
    board.registers().notify(queue);
    auto used = driver.get();
    return used && used->written == 1 && board.memory.load<u8>(Gpa(in)) == byte;
}

void life(Board::Kind kind, u64 rings) {
    Board board(kind);
    Registers& registers = board.registers();
    board.echo->offer_packed(true);
    const u64 features = registers.features();
    CHECK_EQ(features, bit(0) | bit(50) | Description::kDefaultRings | kRingPacked);
    CHECK_EQ(registers.queue_size(0), 64u);
    CHECK_EQ(registers.queue_size(1), 16u);
    CHECK_EQ(registers.queue_size(2), 0u);

    // What was not offered, and a driver of before version 1, are refused.
    for (u64 wrong : {kVersion1 | bit(1), u64{kEventIdx}}) {
        registers.set_status(0);
        registers.set_status(kAcknowledge | kDriver);
        registers.set_features(wrong);
        registers.set_status(kReady);
        CHECK(!(registers.status() & kFeaturesOk));
        registers.set_status(kAcknowledge | kDriver | kDriverOk);
        CHECK(!(registers.status() & kDriverOk));
    }

    const u64 chosen = kVersion1 | bit(0) | rings;
    FakeDriver first(board.memory, place(0, chosen)), second(board.memory, place(1, chosen));
    start(board, chosen);
    CHECK_EQ(registers.status(), u8{kReady | kDriverOk});
    CHECK_EQ(board.echo->driver_features(), chosen);
    CHECK_EQ(board.echo->starts, 1);
    CHECK_EQ(registers.take_interrupts(), 0u);
    for (u8 n = 1; n < 100; ++n) CHECK(echoes(board, first, 0, n));
    CHECK_EQ(registers.take_interrupts(), 1u);
    CHECK(echoes(board, second, 1, 0x77));
    CHECK_EQ(registers.take_interrupts(), 1u);
    CHECK_EQ(registers.take_interrupts(), 0u);
    registers.notify(7);  // there is none

    // The configuration space.
    const u32 generation = registers.generation();
    board.echo->tell(9);
    CHECK_EQ(registers.config(1), 9);
    CHECK(registers.generation() != generation);
    CHECK_EQ(registers.take_interrupts(), 2u);
    board.echo->tell(9);  // no news
    CHECK_EQ(registers.take_interrupts(), 0u);
    registers.set_config(0, 0x42);
    registers.set_config(1, 0x42);
    registers.set_config(200, 0x42);
    CHECK_EQ(registers.config(0), 0x42);
    CHECK_EQ(registers.config(1), 9);
    CHECK_EQ(registers.config(200), 0);

    // Paused, it answers nothing; afterwards, what was missed.
    board.echo->pause();
    CHECK(!echoes(board, first, 0, 0x11));
    board.echo->resume();
    CHECK(first.get().has_value());
    CHECK_EQ(registers.take_interrupts(), 1u);

    // One queue anew, the other goes on.
    registers.reset_queue(0);
    CHECK(!registers.queue_enabled(0));
    CHECK(registers.queue_enabled(1));
    CHECK_EQ(board.echo->queue_stops, 1);
    CHECK(echoes(board, second, 1, 0x12));
    FakeDriver again(board.memory, place(0, chosen));
    registers.set_queue(0, place(0, chosen));
    CHECK(echoes(board, again, 0, 0x13));
    registers.take_interrupts();

    // A mistake: the device wants a reset, says so, and does nothing else until it gets one.
    board.memory.store(Gpa(place(1, 0).descriptors), ~u64{0});
    board.memory.store(Gpa(place(1, 0).descriptors + 8), u32{16});
    if (rings & kRingPacked) {
        board.echo->break_down();
    } else {
        const u64 avail = place(1, 0).driver;
        const u16 index = board.memory.load<u16>(Gpa(avail + 2));
        board.memory.store(Gpa(avail + 4 + 2 * (index % 16)), u16{999});
        board.memory.store(Gpa(avail + 2), static_cast<u16>(index + 1));
        registers.notify(1);
    }
    CHECK(registers.status() & kNeedsReset);
    CHECK(!board.echo->failure().empty());
    CHECK(registers.take_interrupts() & 2);
    CHECK(!echoes(board, again, 0, 0x14));
    registers.set_status(0);
    CHECK_EQ(registers.status(), 0);
    CHECK(!registers.queue_enabled(0));
    CHECK(board.echo->failure().empty());
    FakeDriver anew(board.memory, place(0, chosen)), other(board.memory, place(1, chosen));
    start(board, chosen);
    CHECK(echoes(board, anew, 0, 0x15));
}

// The state of a device at work goes into another one, which goes on with the same rings.
void moving(Board::Kind kind, u64 rings) {
    Board from(kind), to(kind);
    for (Board* board : {&from, &to}) board->echo->offer_packed(true);
    const u64 chosen = kVersion1 | rings;
    FakeDriver driver(from.memory, place(0, chosen)), second(from.memory, place(1, chosen));
    start(from, chosen);
    for (u8 n = 0; n < 90; ++n) CHECK(echoes(from, driver, 0, n));
    from.echo->pause();
    to.echo->pause();
    CHECK(!echoes(from, driver, 0, 0x99));  // in the ring, not taken yet
    const std::vector<u8> state = from.registers().save();
    for (u64 at = 0; at < 0x200000; at += kPageSize) {
        to.memory.write(Gpa(at), from.memory.checked(Gpa(at), kPageSize));
    }
    to.registers().restore(state);
    CHECK(to.registers().save() == state);
    CHECK_EQ(to.registers().status(), u8{kReady | kDriverOk});
    to.registers().take_interrupts();
    to.echo->resume();
    CHECK_EQ(to.memory.load<u8>(Gpa(0x110000)), 0x99);
    CHECK_EQ(to.registers().take_interrupts(), 1u);

    for (std::size_t cut : {std::size_t{0}, state.size() / 2, state.size() - 1}) {
        CHECK_THROWS(to.registers().restore(std::span(state).first(cut)), StateError);
    }
}

// Whatever is written to whatever register, in any order: no fault, no hang, and a driver that
// begins anew finds a device that works.
void noise(Board::Kind kind) {
    Random random(77 + static_cast<u64>(kind));
    Board board(kind);
    const u64 chosen = kVersion1 | kEventIdx;
    for (int round = 0; round < 40; ++round) {
        start(board, chosen);
        for (int i = 0; i < 2000; ++i) {
            const u64 at = board.base() + random.below(kind == Board::Kind::kMmio ? 0x200 : 0x4000);
            const u64 value = random.below(4) == 0 ? random.next() : random.below(64);
            switch (random.below(8)) {
                case 0:
                    board.read<u8>(at);
                    break;
                case 1:
                    board.read<u64>(at);
                    break;
                case 2:
                    board.write(at, static_cast<u8>(value));
                    break;
                case 3:
                    board.write(at, static_cast<u16>(value));
                    break;
                case 4:
                    board.write(at, value);
                    break;
                case 5:
                    if (board.bridge) {
                        board.bridge->config_write(0, 1, 0,
                                                   static_cast<u16>(0x40 + random.below(48) * 4),
                                                   static_cast<u32>(value), 4);
                    }
                    break;
                default:
                    board.write(at & ~u64{3}, static_cast<u32>(value));
            }
        }
        FakeDriver first(board.memory, place(0, chosen)), second(board.memory, place(1, chosen));
        start(board, chosen);
        CHECK(echoes(board, first, 0, 0x21));
        CHECK(echoes(board, second, 1, 0x22));
    }
}

// The window of the configuration space reaches the same registers, and shared memory is a BAR.
void pci_extras() {
    Board board(Board::Kind::kPciIntx);
    auto& registers = static_cast<PciRegisters&>(board.registers());
    CHECK_EQ(registers.dword(0), 0x106a1af4u);
    CHECK_EQ(registers.byte(8), 1);
    u16 window = 0, shared = 0;
    registers.find(5, &window);
    CHECK(window != 0);
    board.echo->tell(0x31);
    registers.put(window + 8u, PciTransport::kConfig + 1, 4);
    registers.put(window + 12u, 1, 4);
    CHECK_EQ(registers.byte(window + 16u), 0x31);
    registers.put(window + 8u, PciTransport::kCommon + 0x14, 4);
    registers.put(window + 16u, kAcknowledge, 1);
    CHECK_EQ(registers.status(), u8{kAcknowledge});
    registers.put(window + 8u, 0xfffff000, 4);  // nowhere
    registers.put(window + 12u, 4, 4);
    registers.dword(window + 16u);
    registers.put(window + 16u, 1, 4);

    CHECK_EQ(registers.find(8, &shared), 0u);
    CHECK_EQ(registers.byte(shared + 4u), 2);
    CHECK_EQ(registers.byte(shared + 5u), 7);
    CHECK_EQ(registers.dword(shared + 12u), 4096u);
    const u64 at = registers.transport().bar(2).address;
    board.write(at + 8, u32{0x12345678});
    u32 value;
    std::memcpy(&value, board.echo->mapping.data() + 8, sizeof value);
    CHECK_EQ(value, 0x12345678u);
    CHECK_EQ(board.read<u64>(at + 4), u64{0x12345678} << 32);
    CHECK_EQ(board.read<u64>(at + 4092), ~u64{0});
}

}  // namespace

int main() {
    for (Board::Kind kind : kBoards) {
        for (u64 rings :
             {u64{0}, u64{kEventIdx | kIndirectDesc}, u64{kRingPacked}, kRingPacked | kEventIdx}) {
            life(kind, rings);
            moving(kind, rings);
        }
        noise(kind);
    }
    pci_extras();
    return pvtest::finish("virtio transports");
}
