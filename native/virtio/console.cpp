#include "virtio/console.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <thread>

#include "base/error.hpp"

namespace polyvisor::virtio {

namespace {

constexpr u16 kRingSize = 64;
constexpr unsigned kControlRx = 2, kControlTx = 3;
// Longer output in one chain is no console's: Linux sends a page at most.
constexpr u32 kMostBytes = 1 << 20;

// 5.3.4: the configuration space.
enum Offset : u32 { kColumns = 0, kRows = 2, kMaxPorts = 4, kEmergency = 8, kConfigSize = 12 };

// 5.3.6.2: control messages.
struct Control {
    u32 id;
    u16 event, value;
};
enum Event : u16 {
    kDeviceReady = 0,
    kDeviceAdd = 1,
    kDeviceRemove = 2,
    kPortReady = 3,
    kConsolePort = 4,
    kResize = 5,
    kPortOpen = 6,
    kPortName = 7,
};

}  // namespace

Console::Config Console::checked(Config config) {
    const auto given = static_cast<u32>(config.ports.size());
    if (config.max_ports == 0) config.max_ports = given;
    if (config.max_ports == 0 || config.max_ports > kMostPorts || given > config.max_ports) {
        throw ConfigError("ports", "a virtio console can have 1 to " + std::to_string(kMostPorts) +
                                       " ports, and not more than max_ports");
    }
    for (u32 i = 0; i < given; ++i) {
        for (u32 k = 0; k < i; ++k) {
            const std::string& name = config.ports[i].name;
            if (!name.empty() && name == config.ports[k].name) {
                throw ConfigError("ports", "two ports of one console are called '" + name + "'");
            }
        }
    }
    return config;
}

Description Console::describe(const Config& config) {
    Description description;
    description.type = kConsole;
    description.name = "virtio-console";
    description.features = kEmergencyWrite;
    if (config.size) description.features |= kSize;
    if (config.max_ports > 1) description.features |= kMultiport;
    description.queue_sizes.assign(config.max_ports > 1 ? 2 + 2 * config.max_ports : 2, kRingSize);
    description.config_size = kConfigSize;
    description.pci_class = 0x078000;  // a simple communication controller, as QEMU's
    return description;
}

Console::Console(const Environment& environment, Config config)
    : Device(environment, describe(config = checked(std::move(config)))) {
    for (u32 id = 0; id < config.max_ports; ++id) {
        ports_.push_back(std::make_unique<Port>(*this, id));
        Port& port = *ports_.back();
        if (id < config.ports.size()) {
            port.config = std::move(config.ports[id]);
            port.present = true;
        }
        port.console->attach(port);
        port.console->set_ready_callback([this, id, alive = std::weak_ptr(alive_)] {
            if (auto keep = alive.lock()) kick(ports_[id]->rx() + 1);
        });
    }
    set_config(kMaxPorts, config.max_ports);
    if (config.size) resize(*config.size);
}

Console::~Console() {
    for (auto& port : ports_) {
        port->console->detach();
        port->console->set_ready_callback({});
    }
    // A reader's thread may be in the callback this moment.
    std::weak_ptr<void> used = alive_;
    alive_.reset();
    while (!used.expired()) std::this_thread::yield();
}

// --- For the host --------------------------------------------------------------------------------

bool Console::present(u32 id) const {
    std::lock_guard lock(mutex_);
    return id < ports_.size() && ports_[id]->present;
}

Console::PortConfig Console::port_config(u32 id) const {
    std::lock_guard lock(mutex_);
    return ports_.at(id)->config;
}

bool Console::guest_open(u32 id) const {
    const bool always = id == 0 && started() && !multiport();
    std::lock_guard lock(mutex_);
    return always || ports_.at(id)->guest_open;
}

void Console::set_host_open(u32 id, bool open) {
    {
        std::lock_guard lock(mutex_);
        Port& port = *ports_.at(id);
        if (port.host_open == open) return;
        port.host_open = open;
        if (port.known) say(port, kSayOpen);
    }
    flush_later();
}

void Console::resize(Size size) {
    struct {
        u16 columns, rows;
    } cells{size.columns, size.rows};
    {
        std::lock_guard lock(mutex_);
        size_ = size;
        for (auto& port : ports_) {
            if (port->known && port->config.console) say(*port, kSaySize);
        }
    }
    set_config(kColumns, cells);
    flush_later();
}

u32 Console::add_port(PortConfig config) {
    u32 id = 0;
    {
        std::lock_guard lock(mutex_);
        for (auto& port : ports_) {
            if (port->present && !config.name.empty() && port->config.name == config.name) {
                throw ConfigError("name", "the console has a port '" + config.name + "' already");
            }
        }
        while (id < ports_.size() && ports_[id]->present) ++id;
        if (id == ports_.size()) {
            throw StateMismatch("all " + std::to_string(id) +
                                " ports of the console are in use; make it with a larger "
                                "max_ports");
        }
        Port& port = *ports_[id];
        port.config = std::move(config);
        port.present = port.host_open = true;
        port.known = driver_ready_;
        if (port.known) say(port, kSayAdd);
    }
    flush_later();
    return id;
}

void Console::remove_port(u32 id) {
    if (max_ports() == 1) {
        throw StateMismatch(
            "the console's only port is there for good; make it with a larger "
            "max_ports");
    }
    {
        std::lock_guard lock(mutex_);
        if (id >= ports_.size() || !ports_[id]->present) {
            throw ConfigError("id", "the console has no port " + std::to_string(id));
        }
        Port& port = *ports_[id];
        port.present = port.guest_open = false;
        port.messages = 0;
        if (port.known) say(port, kSayRemove);
        port.known = false;
    }
    flush_later();
}

void Console::machine_ended() {
    for (auto& port : ports_) port->console->close();
}

// --- Bytes ---------------------------------------------------------------------------------------

void Console::serve(unsigned index, Queue& queue) {
    if (index == kControlRx) return give_control(queue);
    if (index == kControlTx) return take_control(queue);
    Port& port = *ports_[index < kControlRx ? 0 : index / 2 - 1];
    if (index % 2 == 1) {
        take_output(port, queue);
    } else {
        have_room(port);
    }
}

// The callback of the host's end that has read comes back here through kick().
void Console::take_output(Port& port, Queue& queue) {
    devices::HostConsole& sink = *port.console;
    drain(queue, port.out, [&] {
        if (!sink.ready()) {
            queue.unpop(port.out);
            return false;
        }
        if (PV_UNLIKELY(port.out.readable_bytes() > kMostBytes)) {
            fail("port " + std::to_string(port.id) + " sends " +
                 std::to_string(port.out.readable_bytes()) + " bytes at once");
            return false;
        }
        for (const Buffer& buffer : port.out.readable()) sink.write({buffer.data, buffer.size});
        queue.push(port.out, 0);
        return true;
    });
}

// A driver that is not told of ports has one; others discard what comes before a program listens.
bool Console::may_receive(const Port& port) const {
    if (!multiport()) return port.id == 0;
    std::lock_guard lock(mutex_);
    return port.guest_open;
}

std::size_t Console::Port::receive(std::span<const u8> bytes) {
    auto set_refused = [this](bool value) {
        std::lock_guard lock(device.mutex_);
        refused = value;
    };
    set_refused(true);  // first, so that room that appears meanwhile is noticed
    std::size_t taken = 0;
    Held held = device.hold(rx());
    if (!held || !device.may_receive(*this)) return 0;
    do {
        while (taken < bytes.size() && held->pop(in)) {
            const u32 put = in.write(0, bytes.subspan(taken));
            held->push(in, put);
            taken += put;
        }
    } while (taken < bytes.size() && held->enable_notify());
    if (taken == bytes.size()) set_refused(false);
    return taken;
}

void Console::Port::set_room_callback(std::function<void()> callback) {
    std::lock_guard lock(device.mutex_);
    room = std::move(callback);
}

// On the loop's thread, as the caller holds a queue, and the callback offers bytes again.
void Console::have_room(Port& port) {
    {
        std::lock_guard lock(mutex_);
        if (!port.refused || !port.room) return;
        port.refused = false;
    }
    post([this, &port] {
        std::function<void()> room;
        {
            std::lock_guard lock(mutex_);
            room = port.room;
        }
        if (room) room();
    });
}

void Console::post(std::function<void()> task) {
    loop().post([alive = std::weak_ptr(alive_), task = std::move(task)] {
        if (auto keep = alive.lock()) task();
    });
}

// --- Control messages ----------------------------------------------------------------------------

void Console::say(Port& port, u8 messages) {
    port.messages |= messages;
}

// From the loop's thread: the caller may hold the other control queue, which is behind this one.
void Console::flush_later() {
    if (!multiport()) return;
    post([this] { kick(kControlRx); });
}

void Console::take_control(Queue& queue) {
    bool answer = false;
    drain(queue, control_out_, [&] {
        std::array<u8, sizeof(Control)> message{};
        if (control_out_.read(0, message) == message.size()) {
            on_control(message);
            answer = true;
        }
        queue.push(control_out_, 0);
    });
    if (answer) flush_later();
}

void Console::on_control(std::span<const u8> message) {
    Control control;
    std::memcpy(&control, message.data(), sizeof control);
    std::unique_lock lock(mutex_);
    if (control.event == kDeviceReady) {
        driver_ready_ = control.value != 0;
        for (auto& port : ports_) {
            port->known = driver_ready_ && port->present;
            if (port->known) say(*port, kSayAdd);
        }
        return;
    }
    if (control.id >= ports_.size()) return;  // a driver's nonsense
    Port& port = *ports_[control.id];
    if (!port.known) return;
    switch (control.event) {
        case kPortReady: {
            if (control.value == 0) break;
            u8 all = kSayOpen;
            if (port.config.console) all |= kSayConsole;
            if (port.config.console && has(kSize)) all |= kSaySize;
            if (!port.config.name.empty()) all |= kSayName;
            say(port, all);
            break;
        }
        case kPortOpen:
            port.guest_open = control.value != 0;
            lock.unlock();
            have_room(port);
            break;
        default:
            break;
    }
}

// With the mutex. False: there is none.
bool Console::next_message(std::vector<u8>& message) {
    for (auto& port : ports_) {
        const u8 bit = port->messages & static_cast<u8>(-port->messages);
        if (bit == 0) continue;
        port->messages &= static_cast<u8>(~bit);
        Control control{port->id, 0, 1};
        std::vector<u8> rest;
        switch (bit) {
            case kSayRemove:
                control.event = kDeviceRemove;
                break;
            case kSayAdd:
                control.event = kDeviceAdd;
                break;
            case kSayConsole:
                control.event = kConsolePort;
                break;
            case kSayName:
                control.event = kPortName;
                rest.assign(port->config.name.begin(), port->config.name.end());
                break;
            case kSaySize: {
                // 5.3.6.2 has the columns first.
                const u16 cells[2] = {size_.columns, size_.rows};
                const u8* from = reinterpret_cast<const u8*>(cells);
                control.event = kResize;
                rest.assign(from, from + sizeof cells);
                break;
            }
            default:
                control.event = kPortOpen;
                control.value = port->host_open;
                break;
        }
        const u8* from = reinterpret_cast<const u8*>(&control);
        message.assign(from, from + sizeof control);
        message.insert(message.end(), rest.begin(), rest.end());
        return true;
    }
    return false;
}

void Console::give_control(Queue& queue) {
    std::vector<u8> message;
    drain(queue, control_in_, [&] {
        bool found = false;
        {
            std::lock_guard lock(mutex_);
            found = next_message(message);
        }
        if (!found) {
            queue.unpop(control_in_);
            return false;
        }
        queue.push(control_in_, control_in_.write(0, message));
        return true;
    });
}

// --- Configuration and state ---------------------------------------------------------------------

bool Console::config_writable(u32 offset) const {
    return offset >= kEmergency;
}

// 5.3.5: a byte of output from a driver that has no queues yet, or none any more.
void Console::config_written(u32 offset, u32 size) {
    if (offset > kEmergency || offset + size <= kEmergency) return;
    const u8 byte = config<u8>(kEmergency);
    ports_[0]->console->write({&byte, 1});
}

void Console::stop() {
    std::lock_guard lock(mutex_);
    driver_ready_ = false;
    for (auto& port : ports_) {
        port->known = port->guest_open = false;
        port->messages = 0;
    }
}

std::vector<u8> Console::save_device() const {
    std::lock_guard lock(mutex_);
    std::vector<u8> state{driver_ready_};
    for (const auto& port : ports_) {
        state.insert(state.end(), {port->present, port->known, port->guest_open, port->host_open,
                                   port->messages});
    }
    return state;
}

void Console::restore_device(std::span<const u8> state) {
    constexpr std::size_t kEach = 5;
    if (state.size() != 1 + kEach * ports_.size()) {
        throw StateError("ports", "the saved state of '" + name() +
                                      "' has another number of ports than the device; make it "
                                      "with the same max_ports");
    }
    std::lock_guard lock(mutex_);
    driver_ready_ = state[0] != 0;
    for (auto& port : ports_) {
        const u8* at = &state[1 + kEach * port->id];
        port->present = at[0] != 0;
        port->known = at[1] != 0 && (port->present || (at[4] & kSayRemove));
        port->guest_open = at[2] != 0 && port->present;
        port->host_open = at[3] != 0;
        port->messages = at[4];
    }
}

}  // namespace polyvisor::virtio
