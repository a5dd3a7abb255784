// virtio-console (virtio 1.2, 5.3): a console or several, and named ports.
//
// A port's bytes go to and from a HostConsole, the same that is plugged into a serial port. Output
// is taken on the thread that notifies, with no hand-over: the bytes are copied where readers find
// them. While a reader with flow control is behind, chains stay in the queue and the guest waits.
//
// With one console and room for no more ports MULTIPORT is not offered, which saves a driver the
// control queues.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "devices/host_console.hpp"
#include "virtio/device.hpp"

namespace polyvisor::virtio {

class Console final : public Device {
  public:
    enum Features : u64 { kSize = 1 << 0, kMultiport = 1 << 1, kEmergencyWrite = 1 << 2 };
    static constexpr u32 kMostPorts = 31;

    struct PortConfig {
        std::string name;      ///< as Linux shows it in /dev/virtio-ports; may be empty
        bool console = false;  ///< a terminal (hvc), else a plain stream of bytes
    };
    struct Size {
        u16 rows = 0, columns = 0;
    };
    struct Config {
        std::vector<PortConfig> ports;  ///< the first ones; the others are free
        u32 max_ports = 0;              ///< 0: as many as there are in `ports`
        std::optional<Size> size;       ///< of all consoles
    };
    /// Throws ConfigError.
    Console(const Environment& environment, Config config);
    ~Console() override;

    /// Ports that there can be.
    u32 max_ports() const { return static_cast<u32>(ports_.size()); }
    /// Whether port `id` is there now. (The number of an absent one is free for add_port().)
    bool present(u32 id) const;
    PortConfig port_config(u32 id) const;
    /// The host's end of a port; it stays when the port goes.
    const std::shared_ptr<devices::HostConsole>& console(u32 id) const {
        return ports_.at(id)->console;
    }
    /// Whether the guest has it open.
    bool guest_open(u32 id) const;
    /// What the guest is told of the host's end: open from the beginning.
    void set_host_open(u32 id, bool open);
    /// The size of the consoles, from now on.
    void resize(Size size);
    /// Plugs in a port; its number. Throws StateMismatch when none is free, ConfigError for a name
    /// that is taken.
    u32 add_port(PortConfig config);
    /// Unplugs it. Throws ConfigError when it is not there, StateMismatch without MULTIPORT.
    void remove_port(u32 id);

    void machine_ended() override;

  protected:
    void serve(unsigned index, Queue& queue) override;
    void stop() override;
    bool config_writable(u32 offset) const override;
    void config_written(u32 offset, u32 size) override;
    std::vector<u8> save_device() const override;
    void restore_device(std::span<const u8> state) override;

  private:
    // Control messages to the guest that wait for room. A bit each, in the order in which they go:
    // of each kind the latest counts, so however much a driver asks for, this does not grow.
    enum Message : u8 {
        kSayRemove = 1,
        kSayAdd = 2,
        kSayConsole = 4,
        kSayName = 8,
        kSaySize = 16,
        kSayOpen = 32,
    };
    struct Port final : devices::CharPort {
        Port(Console& device, u32 id) : device(device), id(id) {}
        std::size_t receive(std::span<const u8> bytes) override;
        void set_room_callback(std::function<void()> callback) override;
        unsigned rx() const { return id == 0 ? 0 : 2 + 2 * id; }

        Console& device;
        const u32 id;
        std::shared_ptr<devices::HostConsole> console = std::make_shared<devices::HostConsole>();
        Chain in, out;  // with the queues' mutexes
        // With the device's mutex.
        PortConfig config;
        bool present = false, known = false;  // known: the guest heard of it
        bool guest_open = false, host_open = true;
        bool refused = false;  // receive() took less than offered
        u8 messages = 0;
        std::function<void()> room;
    };

    static Description describe(const Config& config);
    static Config checked(Config config);
    bool multiport() const { return has(kMultiport); }
    bool may_receive(const Port& port) const;
    void take_output(Port& port, Queue& queue);
    void have_room(Port& port);
    void take_control(Queue& queue);
    void on_control(std::span<const u8> message);
    bool next_message(std::vector<u8>& message);
    void give_control(Queue& queue);
    void say(Port& port, u8 messages);
    void flush_later();
    void post(std::function<void()> task);

    std::vector<std::unique_ptr<Port>> ports_;  // by number
    mutable std::mutex mutex_;                  // after the queues'
    Size size_;
    bool driver_ready_ = false;
    Chain control_in_, control_out_;
    std::shared_ptr<void> alive_ = std::make_shared<int>();  // for tasks on the loop
};

}  // namespace polyvisor::virtio
