#include "devices/host_console.hpp"

#include <algorithm>
#include <array>

namespace polyvisor::devices {

void HostConsole::write(std::span<const u8> bytes) {
    bool heard = false;
    {
        std::lock_guard lock(mutex_);
        append(bytes);
        heard = waiting_ != 0;
    }
    if (heard) changed_.notify_all();
}

void HostConsole::append(std::span<const u8> bytes) {
    while (!bytes.empty()) {
        const std::size_t at = size_ % kChunk;
        if (at == 0) {
            const u64 second = first_ + kChunk;
            if (size_ >= second + kKept && (!flow_control_ || read_ >= second)) {
                kept_.push_back(std::move(kept_.front()));
                kept_.pop_front();
                first_ = second;
            } else {
                kept_.push_back(std::make_unique_for_overwrite<u8[]>(kChunk));
            }
        }
        const std::size_t count = std::min(bytes.size(), kChunk - at);
        std::copy_n(bytes.begin(), count, kept_.back().get() + at);
        size_ += count;
        bytes = bytes.subspan(count);
    }
}

bool HostConsole::ready() const {
    std::lock_guard lock(mutex_);
    return ready_locked();
}

void HostConsole::set_ready_callback(std::function<void()> callback) {
    std::lock_guard lock(mutex_);
    ready_ = std::move(callback);
}

u64 HostConsole::size() const {
    std::lock_guard lock(mutex_);
    return size_;
}

u64 HostConsole::read(u64 offset, std::size_t limit, std::string& into) {
    std::function<void()> ready;
    u64 end = 0;
    {
        std::lock_guard lock(mutex_);
        offset = std::clamp(offset, first_, size_);
        end = offset + std::min<u64>(limit, size_ - offset);
        while (offset < end) {
            const std::size_t at = offset % kChunk;
            const std::size_t count = std::min<u64>(kChunk - at, end - offset);
            const u8* from = kept_[(offset - first_) / kChunk].get() + at;
            into.append(reinterpret_cast<const char*>(from), count);
            offset += count;
        }
        bool before = ready_locked();
        read_ = std::max(read_, end);
        if (!before && ready_locked()) ready = ready_;
    }
    if (ready) ready();
    return end;
}

bool HostConsole::wait(u64 offset, Duration timeout) const {
    std::unique_lock lock(mutex_);
    auto done = [&] { return size_ > offset || closed_; };
    ++waiting_;
    if (timeout == kForever) {
        changed_.wait(lock, done);
    } else {
        changed_.wait_for(lock, timeout, done);
    }
    --waiting_;
    return size_ > offset;
}

void HostConsole::close() {
    {
        std::lock_guard lock(mutex_);
        closed_ = true;
    }
    changed_.notify_all();
}

bool HostConsole::closed() const {
    std::lock_guard lock(mutex_);
    return closed_;
}

void HostConsole::set_flow_control(bool on) {
    std::function<void()> ready;
    {
        std::lock_guard lock(mutex_);
        flow_control_ = on;
        if (ready_locked()) ready = ready_;
    }
    if (ready) ready();
}

void HostConsole::attach(CharPort& port) {
    {
        std::lock_guard lock(input_mutex_);
        port_ = &port;
    }
    port.set_room_callback([this] { feed(); });
}

void HostConsole::detach() {
    std::lock_guard lock(input_mutex_);
    if (port_ != nullptr) port_->set_room_callback({});
    port_ = nullptr;
}

void HostConsole::send(std::span<const u8> bytes) {
    {
        std::lock_guard lock(input_mutex_);
        input_.insert(input_.end(), bytes.begin(), bytes.end());
    }
    feed();
}

std::size_t HostConsole::unsent() const {
    std::lock_guard lock(input_mutex_);
    return input_.size();
}

void HostConsole::feed() {
    std::lock_guard lock(input_mutex_);
    while (port_ != nullptr && !input_.empty()) {
        std::array<u8, 1024> chunk;
        std::size_t count = std::min(chunk.size(), input_.size());
        std::copy_n(input_.begin(), count, chunk.begin());
        std::size_t taken = port_->receive({chunk.data(), count});
        input_.erase(input_.begin(), input_.begin() + static_cast<std::ptrdiff_t>(taken));
        if (taken < count) return;  // the port calls again when it has room
    }
}

}  // namespace polyvisor::devices
