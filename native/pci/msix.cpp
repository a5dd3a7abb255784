#include "pci/msix.hpp"

#include <bit>
#include <cstring>

#include "base/error.hpp"

namespace polyvisor::pci {

namespace {

constexpr u64 kEntrySize = 16;
constexpr u32 kMasked = 1;

}  // namespace

Msix::Msix(MsiSink& sink, unsigned vectors) : sink_(sink) {
    if (vectors == 0 || vectors > kMaxVectors) {
        throw ConfigError("vectors", "MSI-X has 1 to 2048 vectors, not " + std::to_string(vectors));
    }
    entries_.resize(vectors);
    pending_.resize((vectors + 63) / 64);
}

u64 Msix::pba_offset() const {
    return align_up(entries_.size() * kEntrySize, 2048);
}

u64 Msix::bar_size() const {
    return std::max<u64>(std::bit_ceil(pba_offset() + pending_.size() * 8), kPageSize);
}

std::array<u8, 10> Msix::capability(u8 bar) const {
    std::array<u8, 10> body{};
    u32 pba = static_cast<u32>(pba_offset()) | bar;
    unsigned last = vectors() - 1;
    body[0] = static_cast<u8>(last);
    body[1] = static_cast<u8>(last >> 8);
    body[2] = bar;  // table: offset 0
    for (unsigned i = 0; i < 4; ++i) body[6 + i] = static_cast<u8>(pba >> (8 * i));
    return body;
}

void Msix::reset() {
    std::lock_guard lock(mutex_);
    for (Entry& entry : entries_) entry = Entry{};
    std::fill(pending_.begin(), pending_.end(), 0);
    control_ = 0;
}

// control, then the entries, then the pending bits; all little-endian as the host is.
std::vector<u8> Msix::save() const {
    std::lock_guard lock(mutex_);
    std::vector<u8> bytes(8 + entries_.size() * sizeof(Entry) + pending_.size() * 8);
    u8* at = bytes.data();
    std::memcpy(at, &control_, sizeof control_);
    std::memcpy(at + 8, entries_.data(), entries_.size() * sizeof(Entry));
    std::memcpy(at + 8 + entries_.size() * sizeof(Entry), pending_.data(), pending_.size() * 8);
    return bytes;
}

void Msix::restore(std::span<const u8> state) {
    std::lock_guard lock(mutex_);
    if (state.size() != 8 + entries_.size() * sizeof(Entry) + pending_.size() * 8) {
        throw StateError("size", "the saved MSI-X state is of another number of vectors than " +
                                     std::to_string(entries_.size()));
    }
    std::memcpy(&control_, state.data(), sizeof control_);
    control_ &= kEnable | kFunctionMask;
    std::memcpy(entries_.data(), state.data() + 8, entries_.size() * sizeof(Entry));
    for (Entry& entry : entries_) entry.control &= kMasked;
    std::memcpy(pending_.data(), state.data() + 8 + entries_.size() * sizeof(Entry),
                pending_.size() * 8);
}

bool Msix::masked(unsigned vector) const {
    return (control_ & kFunctionMask) || (entries_[vector].control & kMasked);
}

// Sends what is pending and no longer masked, without the mutex: the interrupt's way may lead back
// into the device that owns us.
void Msix::flush(std::unique_lock<std::mutex>& lock) {
    if (!(control_ & kEnable)) return;
    std::vector<Entry> due;
    for (unsigned i = 0; i < entries_.size(); ++i) {
        u64 mask = bit(i % 64);
        if (!(pending_[i / 64] & mask) || masked(i)) continue;
        pending_[i / 64] &= ~mask;
        due.push_back(entries_[i]);
    }
    lock.unlock();
    for (const Entry& entry : due) sink_.send(entry.address, entry.data);
}

void Msix::set_control(u16 control) {
    std::unique_lock lock(mutex_);
    control_ = control & (kEnable | kFunctionMask);
    flush(lock);
}

bool Msix::enabled() const {
    std::lock_guard lock(mutex_);
    return control_ & kEnable;
}

void Msix::notify(unsigned vector) {
    std::unique_lock lock(mutex_);
    if (vector >= entries_.size() || !(control_ & kEnable)) return;
    if (masked(vector)) {
        pending_[vector / 64] |= bit(vector % 64);
        return;
    }
    Entry entry = entries_[vector];
    lock.unlock();
    sink_.send(entry.address, entry.data);
}

void Msix::read(u64 offset, std::span<u8> data) {
    std::lock_guard lock(mutex_);
    std::fill(data.begin(), data.end(), u8{0});
    u64 table = entries_.size() * kEntrySize, pba = pba_offset();
    for (std::size_t i = 0; i < data.size(); ++i) {
        u64 at = offset + i;
        if (at < table) {
            const Entry& entry = entries_[at / kEntrySize];
            data[i] = reinterpret_cast<const u8*>(&entry)[at % kEntrySize];
        } else if (at >= pba && at < pba + pending_.size() * 8) {
            data[i] = reinterpret_cast<const u8*>(pending_.data())[at - pba];
        }
    }
}

void Msix::write(u64 offset, std::span<const u8> data) {
    // PCI 3.0 6.8.2: only whole dwords and qwords; anything else is undefined and dropped here.
    if ((data.size() != 4 && data.size() != 8) || offset % 4 != 0) return;
    std::unique_lock lock(mutex_);
    for (std::size_t i = 0; i < data.size(); i += 4) {
        u64 at = offset + i;
        if (at >= entries_.size() * kEntrySize) break;  // the PBA is read-only
        u32 value;
        std::memcpy(&value, data.data() + i, sizeof value);
        Entry& entry = entries_[at / kEntrySize];
        switch (at % kEntrySize) {
            case 0:
                entry.address = (entry.address & ~u64{0xffffffff}) | (value & ~3u);
                break;
            case 4:
                entry.address = (entry.address & 0xffffffff) | static_cast<u64>(value) << 32;
                break;
            case 8:
                entry.data = value;
                break;
            default:
                entry.control = value & kMasked;
        }
    }
    flush(lock);
}

}  // namespace polyvisor::pci
