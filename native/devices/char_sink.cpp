#include "devices/char_sink.hpp"

namespace polyvisor::devices {

OutputBatch::OutputBatch(Clock& clock, CharSink* sink)
    : sink_(sink), clock_(clock), timer_(clock, [this] { idle(); }) {
    bytes_.reserve(kBatch);
}

void OutputBatch::put(u8 byte) {
    if (sink_ == nullptr) return;
    std::lock_guard lock(mutex_);
    bytes_.push_back(byte);
    if (byte == '\n' || bytes_.size() >= kBatch) {
        flush_locked();
    } else if (!timer_armed_) {
        // The timer stays armed when a newline flushes first: disarming and arming it for each line
        // costs more than finding nothing to do.
        timer_armed_ = true;
        timer_.arm(clock_.now() + kIdle);
    }
}

void OutputBatch::flush() {
    if (sink_ == nullptr) return;
    std::lock_guard lock(mutex_);
    flush_locked();
}

void OutputBatch::idle() {
    std::lock_guard lock(mutex_);
    timer_armed_ = false;
    flush_locked();
}

void OutputBatch::flush_locked() {
    if (bytes_.empty()) return;
    sink_->write(bytes_);
    bytes_.clear();
}

}  // namespace polyvisor::devices
