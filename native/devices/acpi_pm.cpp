#include "devices/acpi_pm.hpp"

#include "bus/pod_state.hpp"

namespace polyvisor::devices {

namespace {

// PM1 status and enable bits (ACPI 6.4, 4.8.3.1), and the control register's.
constexpr u16 kTimerStatus = 1 << 0, kGlobal = 1 << 5, kPowerButton = 1 << 8;
constexpr u16 kStatusBits =
    kTimerStatus | 1 << 4 | kGlobal | kPowerButton | 1 << 9 | 1 << 10 | 1 << 15;
constexpr u16 kEnableBits = kTimerStatus | kGlobal | kPowerButton | 1 << 9 | 1 << 10;
constexpr u16 kSciEnable = 1 << 0, kControlBits = 0x1c06, kSleepEnable = 1 << 13;

constexpr u64 kBillion = 1'000'000'000;

// A register of two bytes, seen one byte at a time.
u8 byte_of(u16 value, u64 n) {
    return static_cast<u8>(value >> (8 * n));
}
u16 byte_at(u8 value, u64 n) {
    return static_cast<u16>(value << (8 * n));
}
void replace(u16& reg, u8 value, u64 n, u16 writable) {
    u16 mask = writable & byte_at(0xff, n);
    reg = static_cast<u16>((reg & ~mask) | (byte_at(value, n) & mask));
}

}  // namespace

AcpiPm::AcpiPm(Clock& clock, IrqLine& sci, std::function<void()> power_off, bool timer_32bit)
    : clock_(clock),
      sci_(sci),
      power_off_(std::move(power_off)),
      timer_bits_(timer_32bit ? 32 : 24),
      timer_(clock, [this] {
          std::lock_guard lock(mutex_);
          Nanoseconds now = clock_.now();
          update_timer_status(now);
          update_sci();
          schedule(now);
      }) {}

u64 AcpiPm::ticks(Nanoseconds now) const {
    return static_cast<u64>(static_cast<u128>(now) * kTimerFrequency / kBillion);
}

// TMR_STS is set whenever the timer's top bit changes (ACPI 6.4, 4.8.1.1).
void AcpiPm::update_timer_status(Nanoseconds now) {
    u64 changes = ticks(now) >> (timer_bits_ - 1);
    if (changes != overflows_seen_) state_.pm1_status |= kTimerStatus;
    overflows_seen_ = changes;
}

void AcpiPm::schedule(Nanoseconds now) {
    if (!(state_.pm1_enable & kTimerStatus)) {
        timer_.disarm();
        return;
    }
    u64 change = ((ticks(now) >> (timer_bits_ - 1)) + 1) << (timer_bits_ - 1);
    timer_.arm(static_cast<u64>((static_cast<u128>(change) * kBillion + kTimerFrequency - 1) /
                                kTimerFrequency));
}

void AcpiPm::update_sci() {
    bool level = (state_.pm1_status & state_.pm1_enable) != 0 ||
                 (state_.gpe_status & state_.gpe_enable) != 0;
    if (level == sci_level_) return;
    sci_level_ = level;
    sci_.set(level);
}

void AcpiPm::reset() {
    std::lock_guard lock(mutex_);
    state_ = State{};
    overflows_seen_ = ticks(clock_.now()) >> (timer_bits_ - 1);
    timer_.disarm();
    update_sci();
}

std::vector<u8> AcpiPm::save() const {
    std::lock_guard lock(mutex_);
    return save_pod(state_);
}

void AcpiPm::restore(std::span<const u8> bytes) {
    State state = load_pod<State>(bytes, name());
    check_state((state.pm1_status & ~kStatusBits) == 0, name(), "pm1_status");
    check_state((state.pm1_enable & ~kEnableBits) == 0, name(), "pm1_enable");
    check_state((state.pm1_control & ~kControlBits) == 0, name(), "pm1_control");
    std::lock_guard lock(mutex_);
    state_ = state;
    Nanoseconds now = clock_.now();
    overflows_seen_ = ticks(now) >> (timer_bits_ - 1);
    schedule(now);
    update_sci();
}

void AcpiPm::press_power_button() {
    std::lock_guard lock(mutex_);
    state_.pm1_status |= kPowerButton;
    update_sci();
}

void AcpiPm::raise_gpe(unsigned number) {
    if (number > 15) return;
    std::lock_guard lock(mutex_);
    state_.gpe_status |= static_cast<u16>(1u << number);
    update_sci();
}

u8 AcpiPm::read_byte(u64 offset, u32 timer) const {
    switch (offset) {
        case kEventOffset:
        case kEventOffset + 1:
            return byte_of(state_.pm1_status, offset & 1);
        case kEventOffset + 2:
        case kEventOffset + 3:
            return byte_of(state_.pm1_enable, offset & 1);
        case kControlOffset:
        case kControlOffset + 1:
            return byte_of(state_.pm1_control | kSciEnable, offset & 1);
        case kTimerOffset:
        case kTimerOffset + 1:
        case kTimerOffset + 2:
        case kTimerOffset + 3:
            return static_cast<u8>(timer >> (8 * (offset & 3)));
        case kGpeOffset:
        case kGpeOffset + 1:
            return byte_of(state_.gpe_status, offset & 1);
        case kGpeOffset + 2:
        case kGpeOffset + 3:
            return byte_of(state_.gpe_enable, offset & 1);
        default:
            return 0;
    }
}

bool AcpiPm::write_byte(u64 offset, u8 value) {
    switch (offset) {
        case kEventOffset:
        case kEventOffset + 1:  // cleared by writing ones
            state_.pm1_status &= static_cast<u16>(~byte_at(value, offset & 1));
            break;
        case kEventOffset + 2:
        case kEventOffset + 3:
            replace(state_.pm1_enable, value, offset & 1, kEnableBits);
            break;
        case kControlOffset:
        case kControlOffset + 1: {
            replace(state_.pm1_control, value, offset & 1, kControlBits);
            bool sleep = byte_at(value, offset & 1) & kSleepEnable;
            return sleep && (state_.pm1_control >> 10 & 7) == kSleepTypeS5;
        }
        case kGpeOffset:
        case kGpeOffset + 1:
            state_.gpe_status &= static_cast<u16>(~byte_at(value, offset & 1));
            break;
        case kGpeOffset + 2:
        case kGpeOffset + 3:
            replace(state_.gpe_enable, value, offset & 1, 0xffff);
            break;
        default:
            break;
    }
    return false;
}

void AcpiPm::read(u64 offset, std::span<u8> data) {
    std::lock_guard lock(mutex_);
    Nanoseconds now = clock_.now();
    update_timer_status(now);
    u32 timer = static_cast<u32>(ticks(now) & (bit(timer_bits_) - 1));
    for (u8& byte : data) byte = read_byte(offset++, timer);
    update_sci();
}

void AcpiPm::write(u64 offset, std::span<const u8> data) {
    bool sleep = false;
    {
        std::lock_guard lock(mutex_);
        Nanoseconds now = clock_.now();
        update_timer_status(now);
        for (u8 byte : data) sleep |= write_byte(offset++, byte);
        schedule(now);
        update_sci();
    }
    if (sleep && power_off_) power_off_();
}

void ResetControl::read(u64, std::span<u8> data) {
    for (u8& byte : data) byte = value_;
}

void ResetControl::write(u64, std::span<const u8> data) {
    u8 value = data[0] & 0x0e;
    u8 before = value_.exchange(value);
    if ((value & ~before & 0x04) && reset_) reset_();
}

void ResetControl::restore(std::span<const u8> state) {
    value_ = load_pod<u8>(state, name()) & 0x0e;
}

void SystemControlA::read(u64, std::span<u8> data) {
    for (u8& byte : data) byte = value_;
}

void SystemControlA::write(u64, std::span<const u8> data) {
    u8 before = value_.exchange(data[0] & 0xfe);  // the reset bit does not stay
    if (a20_ && ((before ^ data[0]) & 2)) a20_(data[0] & 2);
    if (reset_ && (data[0] & 1)) reset_();
}

void SystemControlA::reset() {
    u8 before = value_.exchange(2);
    if (a20_ && !(before & 2)) a20_(true);
}

void SystemControlA::restore(std::span<const u8> state) {
    u8 value = load_pod<u8>(state, name()) & 0xfe;
    u8 before = value_.exchange(value);
    if (a20_ && ((before ^ value) & 2)) a20_(value & 2);
}

}  // namespace polyvisor::devices
