// The engines by name. To add one: write it (see cpu/engine.hpp), and give it a row in engines.cpp.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpu/engine.hpp"

namespace polyvisor {

struct EngineStatus {
    std::string name;
    std::string reason;   ///< "" when it works here, otherwise a short key
    std::string message;  ///< a sentence: what it is, or what is missing and what to do
};

/// Every engine there is, the preferred one first, and whether it works here.
std::vector<EngineStatus> engines();

/// What the engine implements, for the CPUID policy. `name` is "auto" or one of engines().
/// Throws ConfigError for an unknown name, EngineUnavailable for one that cannot run here.
FeatureSet engine_features(const std::string& name);
std::unique_ptr<Engine> create_engine(const std::string& name, const EngineConfig& config);

}  // namespace polyvisor
