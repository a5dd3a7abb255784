#include "machine/console.hpp"

#include <algorithm>
#include <array>

namespace polyvisor {

void SerialConsole::write(std::span<const u8> bytes) {
    {
        std::lock_guard lock(mutex_);
        kept_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
        size_ += bytes.size();
        // Dropping only when twice as much is there keeps the cost of a byte constant.
        if (!flow_control_ && kept_.size() > 2 * kKept) kept_.erase(0, kept_.size() - kKept);
    }
    changed_.notify_all();
}

bool SerialConsole::ready() const {
    std::lock_guard lock(mutex_);
    return ready_locked();
}

void SerialConsole::set_ready_callback(std::function<void()> callback) {
    std::lock_guard lock(mutex_);
    ready_ = std::move(callback);
}

u64 SerialConsole::size() const {
    std::lock_guard lock(mutex_);
    return size_;
}

u64 SerialConsole::read(u64 offset, std::size_t limit, std::string& into) {
    std::function<void()> ready;
    u64 end = 0;
    {
        std::lock_guard lock(mutex_);
        u64 oldest = size_ - kept_.size();
        offset = std::clamp(offset, oldest, size_);
        std::size_t count = std::min<u64>(limit, size_ - offset);
        into.append(kept_, static_cast<std::size_t>(offset - oldest), count);
        end = offset + count;
        bool before = ready_locked();
        read_ = std::max(read_, end);
        if (flow_control_ && read_ - oldest > kKept) {  // read, so it may go
            kept_.erase(0, static_cast<std::size_t>(read_ - oldest));
        }
        if (!before && ready_locked()) ready = ready_;
    }
    if (ready) ready();
    return end;
}

bool SerialConsole::wait(u64 offset, RunControl::Duration timeout) const {
    std::unique_lock lock(mutex_);
    auto done = [&] { return size_ > offset || closed_; };
    if (timeout == RunControl::kForever) {
        changed_.wait(lock, done);
    } else {
        changed_.wait_for(lock, timeout, done);
    }
    return size_ > offset;
}

void SerialConsole::close() {
    {
        std::lock_guard lock(mutex_);
        closed_ = true;
    }
    changed_.notify_all();
}

bool SerialConsole::closed() const {
    std::lock_guard lock(mutex_);
    return closed_;
}

void SerialConsole::set_flow_control(bool on) {
    std::function<void()> ready;
    {
        std::lock_guard lock(mutex_);
        flow_control_ = on;
        if (ready_locked()) ready = ready_;
    }
    if (ready) ready();
}

void SerialConsole::attach(devices::Serial& port) {
    {
        std::lock_guard lock(input_mutex_);
        port_ = &port;
    }
    port.set_room_callback([this] { feed(); });
}

void SerialConsole::detach() {
    std::lock_guard lock(input_mutex_);
    if (port_ != nullptr) port_->set_room_callback({});
    port_ = nullptr;
}

void SerialConsole::send(std::span<const u8> bytes) {
    {
        std::lock_guard lock(input_mutex_);
        input_.insert(input_.end(), bytes.begin(), bytes.end());
    }
    feed();
}

std::size_t SerialConsole::unsent() const {
    std::lock_guard lock(input_mutex_);
    return input_.size();
}

void SerialConsole::feed() {
    std::lock_guard lock(input_mutex_);
    while (port_ != nullptr && !input_.empty()) {
        std::array<u8, 64> chunk;
        std::size_t count = std::min(chunk.size(), input_.size());
        std::copy_n(input_.begin(), count, chunk.begin());
        std::size_t taken = port_->receive({chunk.data(), count});
        input_.erase(input_.begin(), input_.begin() + static_cast<std::ptrdiff_t>(taken));
        if (taken < count) return;  // the port calls again when it has room
    }
}

}  // namespace polyvisor
