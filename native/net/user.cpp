#include "net/user.hpp"

#include <arpa/inet.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/error.hpp"
#include "net/packet.hpp"

namespace polyvisor::net {

namespace {

constexpr u32 kLargestMtu = 65520;  // libslirp's limit
constexpr u32 kTcpHeaders4 = 40, kTcpHeaders6 = 60;
constexpr u8 kTcpSyn = 0x02;

s64 now_ns() {
    timespec now;
    ::clock_gettime(CLOCK_MONOTONIC, &now);
    return s64{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

s64 now_ms() {
    return now_ns() / 1'000'000;
}

in_addr ipv4(const std::string& text, const char* whose) {
    in_addr address{};
    if (::inet_pton(AF_INET, text.c_str(), &address) != 1) {
        throw ConfigError("forward", std::string("the ") + whose + " address '" + text +
                                         "' of a forwarded port is no IPv4 address");
    }
    return address;
}

in_addr fixed(const char* text) {
    in_addr address{};
    ::inet_pton(AF_INET, text, &address);
    return address;
}

in6_addr fixed6(const char* text) {
    in6_addr address{};
    ::inet_pton(AF_INET6, text, &address);
    return address;
}

std::string show(const Forward& forward) {
    return (forward.udp ? "udp:" : "tcp:") + forward.host_address + ":" +
           std::to_string(forward.host_port);
}

// The guest says what it can take at once: with TSO that is more than its wire's MTU.
void raise_segment_size(std::span<u8> frame, u32 offloads) {
    const auto layout = locate(frame);
    if (!layout || layout->protocol != kTcp || layout->payload == 0) return;
    u8* tcp = frame.data() + layout->transport;
    if (!(tcp[13] & kTcpSyn) || !(offloads & (layout->ipv6 ? kTso6 : kTso4))) return;
    const u8* end = frame.data() + layout->payload;
    for (u8* option = tcp + 20; option < end && *option != 0;) {
        if (*option == 1) {
            ++option;
            continue;
        }
        if (end - option < 2 || option[1] < 2 || option[1] > end - option) return;
        if (option[0] == 2 && option[1] == 4) {
            store_be16(option + 2, kLargestMtu - (layout->ipv6 ? kTcpHeaders6 : kTcpHeaders4));
            finish_tcp(frame);
            return;
        }
        option += option[1];
    }
}

}  // namespace

// Timers of libslirp's own (IPv6 router advertisements); those of its TCP come with fill().
struct User::SlirpTimer {
    SlirpTimerCb callback;
    void* opaque;
    s64 deadline;  // milliseconds; -1: none
};

SlirpCb User::callbacks() {
    SlirpCb result{};
    result.send_packet = on_frame;
    result.guest_error = [](const char* message, void* self) {
        auto* user = static_cast<User*>(self);
        if (user->log_ != nullptr) user->log_->note("net", std::string("user: ") + message);
    };
    result.clock_get_ns = [](void*) -> int64_t { return now_ns(); };
    result.timer_new = [](SlirpTimerCb callback, void* opaque, void* self) -> void* {
        auto& timers = static_cast<User*>(self)->timers_;
        timers.push_back(std::make_unique<SlirpTimer>(SlirpTimer{callback, opaque, -1}));
        return timers.back().get();
    };
    result.timer_free = [](void* timer, void* self) {
        std::erase_if(static_cast<User*>(self)->timers_,
                      [timer](const auto& each) { return each.get() == timer; });
    };
    result.timer_mod = [](void* timer, int64_t deadline, void*) {
        static_cast<SlirpTimer*>(timer)->deadline = deadline;
    };
    result.register_poll_fd = [](int, void*) {};  // the next fill() has it
    result.unregister_poll_fd = forget;
    result.notify = [](void*) {};  // whoever called into it asks for its sockets afterwards
    return result;
}

User::User(EventLoop& loop, Log* log, const UserConfig& config)
    : loop_(loop),
      log_(log),
      library_(SlirpLibrary::get()),
      config_(config),
      callbacks_(callbacks()),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)),
      timer_(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)) {
    if (!epoll_ || !timer_) throw_errno("cannot create the descriptors of a user network");
    SlirpConfig slirp{};
    slirp.version = 1;
    slirp.restricted = config.restricted;
    slirp.in_enabled = true;
    slirp.vnetwork = fixed("10.0.2.0");
    slirp.vnetmask = fixed("255.255.255.0");
    slirp.vhost = fixed("10.0.2.2");
    slirp.vdhcp_start = fixed("10.0.2.15");
    slirp.vnameserver = fixed("10.0.2.3");
    slirp.in6_enabled = config.ipv6;
    slirp.vprefix_addr6 = fixed6("fec0::");
    slirp.vprefix_len = 64;
    slirp.vhost6 = fixed6("fec0::2");
    slirp.vnameserver6 = fixed6("fec0::3");
    slirp.vhostname = config_.hostname.c_str();
    slirp.if_mtu = slirp.if_mru = kLargestMtu;
    {
        // libslirp fills in statics of the process when the first one is made.
        static std::mutex once;
        std::scoped_lock lock(once, mutex_);
        slirp_ = library_.create(&slirp, &callbacks_, this);
        if (slirp_ == nullptr) throw ConfigError("backend", "libslirp refuses its configuration");
    }
    try {
        watch(timer_.get(), EPOLLIN);
        for (const Forward& forward : config_.forwards) add_forward(forward);
        wakeup_ = std::make_unique<Wakeup>(loop_, [this] {
            std::lock_guard lock(mutex_);
            give_waiting();
        });
        loop_.watch(epoll_.get(), EPOLLIN, [this](u32) { on_events(); });
        std::lock_guard lock(mutex_);
        refresh();
    } catch (...) {
        wakeup_.reset();
        library_.cleanup(slirp_);
        throw;
    }
}

User::~User() {
    loop_.unwatch(epoll_.get());
    wakeup_.reset();
    std::lock_guard lock(mutex_);
    port_ = nullptr;
    library_.cleanup(slirp_);
}

void User::attach(Port* port) {
    std::lock_guard lock(mutex_);
    port_ = port;
}

void User::start(u32 offloads) {
    offloads_.store(offloads, std::memory_order_relaxed);
}

void User::stop() {
    std::lock_guard lock(mutex_);
    waiting_.clear();
    waiting_bytes_ = 0;
}

// --- From the guest ------------------------------------------------------------------------------

bool User::send(unsigned, const FrameHeader&, std::span<u8> frame) {
    std::lock_guard lock(mutex_);
    const u32 offloads = offloads_.load(std::memory_order_relaxed);
    if (offloads & (kTso4 | kTso6)) raise_segment_size(frame, offloads);
    library_.input(slirp_, frame.data(), static_cast<int>(frame.size()));
    return true;
}

void User::flush(unsigned) {
    std::lock_guard lock(mutex_);
    refresh();
}

// --- To the guest --------------------------------------------------------------------------------

ssize_t User::on_frame(const void* frame, size_t size, void* self) {
    static_cast<User*>(self)->receive({static_cast<const u8*>(frame), size});
    return static_cast<ssize_t>(size);
}

void User::receive(std::span<const u8> frame) {
    if (frame.size() <= config_.mtu + 14) {
        give({.flags = FrameHeader::kDataValid}, frame);
        return;
    }
    // Longer than the guest's MTU: TCP that it asked for in raise_segment_size(), or a datagram.
    const auto layout = locate(frame);
    const u32 headers = layout && layout->ipv6 ? kTcpHeaders6 : kTcpHeaders4;
    if (layout && layout->protocol == kTcp && layout->payload != 0 && config_.mtu > headers) {
        FrameHeader header;
        header.flags = FrameHeader::kNeedsChecksum;
        header.gso = layout->ipv6 ? FrameHeader::kTcp6 : FrameHeader::kTcp4;
        header.header_length = static_cast<u16>(layout->payload);
        header.gso_size = static_cast<u16>(config_.mtu - headers);
        header.checksum_start = static_cast<u16>(layout->transport);
        header.checksum_offset = 16;
        // What stands there in such a frame is the sum of the pseudo header (5.1.6.2): what a guest
        // that forwards it starts from.
        scratch_.assign(frame.begin(), frame.end());
        const u16 pseudo = pseudo_header_sum(frame, *layout, layout->end - layout->transport);
        std::memcpy(scratch_.data() + layout->transport + 16, &pseudo, sizeof pseudo);
        give(header, scratch_);
        return;
    }
    const bool cut = fragment_ipv4(
        frame, config_.mtu, [this](std::span<const u8> fragment) { give({.flags = 0}, fragment); });
    if (!cut) dropped_.fetch_add(1, std::memory_order_relaxed);
}

bool User::give_now(const FrameHeader& header, std::span<const u8> frame) {
    return port_ == nullptr || port_->receive(0, header, frame) != Port::Outcome::kNoRoom;
}

void User::give(const FrameHeader& header, std::span<const u8> frame) {
    if (waiting_.empty() && give_now(header, frame)) return;
    if (waiting_bytes_ + frame.size() > kMostWaiting) {
        dropped_.fetch_add(1, std::memory_order_relaxed);
        return;
    }
    waiting_.push_back({header, {frame.begin(), frame.end()}});
    waiting_bytes_ += frame.size();
}

void User::give_waiting() {
    while (!waiting_.empty() && give_now(waiting_.front().header, waiting_.front().frame)) {
        waiting_bytes_ -= waiting_.front().frame.size();
        waiting_.pop_front();
    }
}

void User::wake(unsigned) {
    wakeup_->raise();
}

// --- Sockets and timers --------------------------------------------------------------------------

void User::on_events() {
    std::lock_guard lock(mutex_);
    u64 expired;
    if (::read(timer_.get(), &expired, sizeof expired) > 0) armed_ = 0;
    give_waiting();
    run_timers();
    const int ready = ::poll(polls_.data(), polls_.size(), 0);
    library_.poll(
        slirp_, ready < 0,
        [](int index, void* self) -> int {
            const auto& polls = static_cast<User*>(self)->polls_;
            if (index < 0 || static_cast<std::size_t>(index) >= polls.size()) return 0;
            const short events = polls[static_cast<std::size_t>(index)].revents;
            return (events & POLLIN ? SLIRP_POLL_IN : 0) | (events & POLLOUT ? SLIRP_POLL_OUT : 0) |
                   (events & POLLPRI ? SLIRP_POLL_PRI : 0) |
                   (events & (POLLERR | POLLNVAL) ? SLIRP_POLL_ERR : 0) |
                   (events & POLLHUP ? SLIRP_POLL_HUP : 0);
        },
        this);
    refresh();
}

void User::run_timers() {
    const s64 now = now_ms();
    for (std::size_t i = 0; i < timers_.size(); ++i) {  // a callback may add one
        SlirpTimer& timer = *timers_[i];
        if (timer.deadline < 0 || timer.deadline > now) continue;
        timer.deadline = -1;
        timer.callback(timer.opaque);
    }
}

void User::refresh() {
    u32 timeout = UINT32_MAX;
    polls_.clear();
    library_.fill(
        slirp_, &timeout,
        [](int fd, int events, void* self) -> int {
            auto& polls = static_cast<User*>(self)->polls_;
            const int wanted = (events & SLIRP_POLL_IN ? POLLIN : 0) |
                               (events & SLIRP_POLL_OUT ? POLLOUT : 0) |
                               (events & SLIRP_POLL_PRI ? POLLPRI : 0);
            polls.push_back({fd, static_cast<short>(wanted), 0});
            return static_cast<int>(polls.size()) - 1;
        },
        this);
    for (const pollfd& poll : polls_) watch(poll.fd, static_cast<u32>(poll.events));
    if (watched_.size() != polls_.size() + 1) {  // and those it does not wait for now
        std::erase_if(watched_, [&](const auto& entry) {
            const int fd = entry.first;
            if (fd == timer_.get() ||
                std::ranges::any_of(polls_, [fd](const pollfd& poll) { return poll.fd == fd; })) {
                return false;
            }
            ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
            return true;
        });
    }
    s64 deadline = timeout == UINT32_MAX ? INT64_MAX : now_ms() + timeout;
    for (const auto& timer : timers_) {
        if (timer->deadline >= 0) deadline = std::min(deadline, timer->deadline);
    }
    if (deadline != INT64_MAX) arm(deadline);
}

// Poll's and epoll's bits are the same for what is used here.
static_assert(POLLIN == EPOLLIN && POLLOUT == EPOLLOUT && POLLPRI == EPOLLPRI);

void User::watch(int fd, u32 events) {
    auto [at, added] = watched_.try_emplace(fd, events);
    if (!added && at->second == events) return;
    at->second = events;
    epoll_event event{.events = events, .data = {.fd = fd}};
    if (::epoll_ctl(epoll_.get(), added ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &event) != 0) {
        ::epoll_ctl(epoll_.get(), added ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event);
    }
}

// Before libslirp closes the descriptor, whose number may come back at once.
void User::forget(int fd, void* self) {
    auto* user = static_cast<User*>(self);
    if (user->watched_.erase(fd) != 0) {
        ::epoll_ctl(user->epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
    }
}

// A timer that is set too early only makes the loop look: it is not worth a system call for each
// frame to set it later.
void User::arm(s64 milliseconds) {
    if (armed_ != 0 && armed_ <= milliseconds) return;
    armed_ = std::max<s64>(milliseconds, 1);
    itimerspec when{};
    when.it_value.tv_sec = armed_ / 1000;
    when.it_value.tv_nsec = armed_ % 1000 * 1'000'000;
    ::timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &when, nullptr);
}

// --- Forwarded ports -----------------------------------------------------------------------------

Forward User::add_forward(const Forward& forward) {
    std::lock_guard lock(mutex_);
    return add_forward_locked(forward);
}

Forward User::add_forward_locked(const Forward& wanted) {
    const in_addr host = ipv4(wanted.host_address, "host");
    const in_addr guest = ipv4(wanted.guest_address, "guest");
    if (wanted.guest_port == 0) {
        throw ConfigError("forward", "the forward " + show(wanted) + " has no port of the guest");
    }
    refresh();
    std::vector<int> before;
    for (const pollfd& poll : polls_) before.push_back(poll.fd);
    errno = 0;
    if (library_.add_forward(slirp_, wanted.udp, host, wanted.host_port, guest,
                             wanted.guest_port) != 0) {
        const std::string why = errno == EADDRINUSE
                                    ? "is taken by another program; choose another "
                                      "one, or 0 for any"
                                    : std::string("cannot be used: ") + std::strerror(errno);
        throw ConfigError("forward", "host port " + show(wanted) + " " + why);
    }
    Forward made = wanted;
    refresh();
    for (const pollfd& poll : polls_) {  // its new socket knows which port it is
        if (std::ranges::find(before, poll.fd) != before.end()) continue;
        sockaddr_in address{};
        socklen_t size = sizeof address;
        if (::getsockname(poll.fd, reinterpret_cast<sockaddr*>(&address), &size) == 0 &&
            address.sin_family == AF_INET && address.sin_addr.s_addr == host.s_addr) {
            made.host_port = ntohs(address.sin_port);
        }
    }
    forwards_.push_back(made);
    return made;
}

void User::remove_forward(const Forward& forward) {
    std::lock_guard lock(mutex_);
    const in_addr host = ipv4(forward.host_address, "host");
    auto at = std::ranges::find_if(forwards_, [&](const Forward& each) {
        return each.udp == forward.udp && each.host_address == forward.host_address &&
               each.host_port == forward.host_port;
    });
    if (at == forwards_.end() ||
        library_.remove_forward(slirp_, forward.udp, host, forward.host_port) != 0) {
        throw ConfigError("forward", "no port " + show(forward) + " is forwarded");
    }
    forwards_.erase(at);
    refresh();
}

std::vector<Forward> User::forwards() const {
    std::lock_guard lock(mutex_);
    return forwards_;
}

}  // namespace polyvisor::net
