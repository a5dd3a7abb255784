// The engines by name. To add one: write it (see cpu/engine.hpp), and give it a row in engines.cpp.
//
// "auto" is the fastest engine that works here, as measured (engine_speed.hpp): there are hosts,
// containers and nested machines mostly, whose KVM is complete but executes ring 0 in software, and
// slower than ours.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpu/engine.hpp"

namespace polyvisor {

struct EngineStatus {
    std::string name;
    std::string reason;   ///< "" when it works here, otherwise a key as in EngineUnavailable
    std::string message;  ///< a sentence: what it is, or what is missing and what to do
};

/// Every engine there is, the preferred one first, and whether it works here.
std::vector<EngineStatus> engines();

struct EngineChoice {
    std::string name;
    /// A sentence about an engine that "auto" passed over though its device is there; empty when
    /// there is nothing to say, or when this process was told before.
    std::string note;
};

/// The engine that `name` ("auto" or one of engines()) stands for here. `deterministic`: "auto"
/// takes one that can be. Throws ConfigError for an unknown name, EngineUnavailable for one that
/// cannot run here.
EngineChoice choose_engine(const std::string& name, bool deterministic = false);

/// What the engine (a resolved name) offers here. `portable`: only what all engines that work here
/// offer, so that a machine's State can go from one to the other; they are then told apart by
/// nothing that a guest sees. Throws as above.
EngineOffer engine_offer(const std::string& name, bool portable = false);
std::unique_ptr<Engine> create_engine(const std::string& name, const EngineConfig& config);

/// Million instructions per second at ring 0; measured once per process (see engine_speed.hpp).
/// Throws as above.
double engine_speed(const std::string& name);

/// What a file that should be KVM's device is worth.
struct KvmProbe {
    EngineStatus status;
    double speed = 0;  ///< as engine_speed(); 0 when it does not work or was not asked for
};
KvmProbe probe_kvm_device(const std::string& path, bool measure);

}  // namespace polyvisor
