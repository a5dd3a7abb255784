// Network cards (virtio-net) and what their cable ends in, which may be an object of Python's.
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "net/socket.hpp"
#include "net/tap.hpp"
#include "net/user.hpp"
#include "virtio/net.hpp"
#include "virtio_handle.hpp"

namespace polyvisor::python {

namespace {

using virtio::MacAddress;
using virtio::Net;

// A frame of the guest's is a call of send(frame: bytes), on the thread that transmits.
class ObjectEnd final : public net::End {
  public:
    ObjectEnd(Core& core, const py::object& object)
        : core_(core),
          name_(py::cast<std::string>(py::type::of(object).attr("__name__"))),
          object_(object) {
        if (!py::hasattr(object, "send")) {
            throw ConfigError("backend",
                              "a " + name_ + " cannot be a network: it has no send(frame)");
        }
        send_ = object.attr("send");
    }
    ~ObjectEnd() override {
        Gil gil;  // the last reference may go on any thread
        send_ = object_ = py::object();
    }

    std::string name() const override { return name_; }
    void attach(net::Port*) override {}
    bool send(unsigned, const net::FrameHeader&, std::span<u8> frame) override {
        Gil gil;
        try {
            send_(py::bytes(reinterpret_cast<const char*>(frame.data()), frame.size()));
            return true;
        } catch (py::error_already_set& error) {
            error.restore();
        }
        core_.fail({name_, "send", 0, frame.size()});
        return false;
    }

  private:
    Core& core_;
    const std::string name_;
    py::object object_, send_;
};

// An end that has been made, and is not in a card yet.
struct NetEnd {
    std::shared_ptr<Core> core;  // whose loop it uses
    std::unique_ptr<net::End> end;
};

template <class T, class... Args>
std::unique_ptr<NetEnd> make_end(const PyMachine& machine, Args&&... args) {
    auto result = std::make_unique<NetEnd>();
    result->core = machine.core();
    const auto environment = python::environment(*result->core);
    result->end = std::make_unique<T>(environment.loop, environment.log, args...);
    return result;
}

using ForwardTuple = std::tuple<std::string, std::string, u16, std::string, u16>;

net::Forward to_forward(const ForwardTuple& tuple) {
    const auto& [protocol, host, host_port, guest, guest_port] = tuple;
    return {protocol == "udp", host, host_port, guest, guest_port};
}

ForwardTuple to_tuple(const net::Forward& forward) {
    return {forward.udp ? "udp" : "tcp", forward.host_address, forward.host_port,
            forward.guest_address, forward.guest_port};
}

net::User& user_of(Net& net) {
    auto* user = dynamic_cast<net::User*>(&net.end());
    if (user == nullptr) {
        throw StateMismatch("only a user network forwards ports; this one's backend is '" +
                            net.end().name() + "'");
    }
    return *user;
}

MacAddress to_mac(const py::bytes& bytes) {
    const std::string text = bytes;
    MacAddress mac{};
    if (text.size() != mac.size()) throw ConfigError("mac", "a MAC address has six bytes");
    std::copy(text.begin(), text.end(), mac.begin());
    return mac;
}

py::dict to_dict(const virtio::NetCounters& counters) {
    py::dict result;
    result["rx_frames"] = counters.rx_frames;
    result["rx_bytes"] = counters.rx_bytes;
    result["rx_dropped"] = counters.rx_dropped;
    result["rx_filtered"] = counters.rx_filtered;
    result["rx_waits"] = counters.rx_waits;
    result["tx_frames"] = counters.tx_frames;
    result["tx_bytes"] = counters.tx_bytes;
    result["tx_dropped"] = counters.tx_dropped;
    return result;
}

}  // namespace

void bind_net(py::module_& module) {
    py::class_<NetEnd>(module, "NetEnd").def_property_readonly("name", [](const NetEnd& self) {
        return self.end ? self.end->name() : "";
    });
    module.def(
        "net_user",
        [](const PyMachine& machine, bool restricted, u32 mtu, bool ipv6,
           const std::string& hostname, const std::vector<ForwardTuple>& forwards) {
            net::UserConfig config{restricted, mtu, ipv6, hostname, {}};
            for (const auto& forward : forwards) config.forwards.push_back(to_forward(forward));
            return make_end<net::User>(machine, config);
        },
        py::arg("machine"), py::kw_only(), py::arg("restricted"), py::arg("mtu"), py::arg("ipv6"),
        py::arg("hostname"), py::arg("forwards"));
    module.def(
        "net_tap",
        [](const PyMachine& machine, const std::string& name, unsigned queues) {
            return make_end<net::Tap>(machine, name, queues);
        },
        py::arg("machine"), py::arg("name"), py::arg("queues"));
    module.def(
        "net_stream",
        [](const PyMachine& machine, const std::string& path, bool listen) {
            return make_end<net::StreamSocket>(machine, path, listen);
        },
        py::arg("machine"), py::arg("path"), py::arg("listen"));
    module.def(
        "net_dgram",
        [](const PyMachine& machine, const std::string& path, const std::string& peer) {
            return make_end<net::DatagramSocket>(machine, path, peer);
        },
        py::arg("machine"), py::arg("path"), py::arg("peer"));
    module.def(
        "net_object",
        [](const PyMachine& machine, const py::object& object) {
            auto result = std::make_unique<NetEnd>();
            result->core = machine.core();
            result->end = std::make_unique<ObjectEnd>(*result->core, object);
            return result;
        },
        py::arg("machine"), py::arg("source"));

    py::class_<Virtio<Net>, VirtioHandle>(module, "VirtioNet")
        .def(py::init([](const PyMachine& machine, NetEnd& end, const py::bytes& mac, u16 mtu,
                         unsigned queues, const std::string& transport, bool packed) {
                 auto core = machine.core();
                 if (!end.end) throw StateMismatch("this end is in a network card already");
                 const virtio::NetConfig config{.mac = to_mac(mac), .mtu = mtu, .pairs = queues};
                 return plug<Net>(
                     core, std::make_shared<Net>(environment(*core), std::move(end.end), config),
                     transport, packed);
             }),
             py::arg("machine"), py::arg("end"), py::kw_only(), py::arg("mac"), py::arg("mtu"),
             py::arg("queues"), py::arg("transport"), py::arg("packed"))
        .def_property_readonly("mac",
                               [](const Virtio<Net>& self) {
                                   const auto mac = self.use([](Net& net) { return net.mac(); });
                                   return py::bytes(reinterpret_cast<const char*>(mac.data()),
                                                    mac.size());
                               })
        .def_property_readonly("end",
                               [](const Virtio<Net>& self) {
                                   return self.use([](Net& net) { return net.end().name(); });
                               })
        .def_property(
            "link",
            [](const Virtio<Net>& self) { return self.use([](Net& net) { return net.link(); }); },
            [](const Virtio<Net>& self, bool up) {
                self.use([up](Net& net) { net.set_link(up); });
            })
        .def_property_readonly("active_queues",
                               [](const Virtio<Net>& self) {
                                   return self.use([](Net& net) { return net.active_pairs(); });
                               })
        .def("statistics",
             [](const Virtio<Net>& self) {
                 return to_dict(self.use([](Net& net) { return net.counters(); }));
             })
        .def(
            "receive",
            [](const Virtio<Net>& self, const py::object& frame) {
                const BufferView view(frame, false);
                return self.use([&](Net& net) { return net.inject(view.bytes()); });
            },
            py::arg("frame"))
        .def(
            "start_capture",
            [](const Virtio<Net>& self, const std::string& path) {
                self.use([&](Net& net) { net.capture().start(path); });
            },
            py::arg("path"))
        .def("stop_capture",
             [](const Virtio<Net>& self) { self.use([](Net& net) { net.capture().stop(); }); })
        .def(
            "add_forward",
            [](const Virtio<Net>& self, const ForwardTuple& forward) {
                return to_tuple(self.use(
                    [&](Net& net) { return user_of(net).add_forward(to_forward(forward)); }));
            },
            py::arg("forward"))
        .def(
            "remove_forward",
            [](const Virtio<Net>& self, const ForwardTuple& forward) {
                self.use([&](Net& net) { user_of(net).remove_forward(to_forward(forward)); });
            },
            py::arg("forward"))
        .def("forwards", [](const Virtio<Net>& self) {
            std::vector<ForwardTuple> result;
            for (const auto& forward : self.use([](Net& net) { return user_of(net).forwards(); })) {
                result.push_back(to_tuple(forward));
            }
            return result;
        });
}

}  // namespace polyvisor::python
