#include "devices/char_backends.hpp"

#include <algorithm>

namespace polyvisor::devices {

void BufferSink::write(std::span<const u8> bytes) {
    std::function<void()> callback;
    {
        std::lock_guard lock(mutex_);
        written_ += bytes.size();
        bytes_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
        if (bytes_.size() > limit_ + limit_ / 2) {  // seldom, so that appending stays cheap
            bytes_.erase(0, bytes_.size() - limit_);
        }
        callback = callback_;
    }
    if (callback) callback();
}

std::string BufferSink::text() const {
    std::lock_guard lock(mutex_);
    return bytes_.size() <= limit_ ? bytes_ : bytes_.substr(bytes_.size() - limit_);
}

std::string BufferSink::take() {
    std::lock_guard lock(mutex_);
    if (bytes_.size() > limit_) bytes_.erase(0, bytes_.size() - limit_);
    return std::exchange(bytes_, {});
}

u64 BufferSink::written() const {
    std::lock_guard lock(mutex_);
    return written_;
}

void BufferSink::set_callback(std::function<void()> callback) {
    std::lock_guard lock(mutex_);
    callback_ = std::move(callback);
}

void TeeSink::write(std::span<const u8> bytes) {
    for (CharSink* sink : sinks_) sink->write(bytes);
}

bool TeeSink::ready() const {
    return std::all_of(sinks_.begin(), sinks_.end(), [](CharSink* sink) { return sink->ready(); });
}

void TeeSink::set_ready_callback(std::function<void()> callback) {
    for (CharSink* sink : sinks_) sink->set_ready_callback(callback);
}

}  // namespace polyvisor::devices
