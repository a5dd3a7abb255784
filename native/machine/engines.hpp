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

/// The engine that `name` ("auto" or one of engines()) stands for here. Throws ConfigError for an
/// unknown name, EngineUnavailable for one that cannot run here.
std::string resolve_engine(const std::string& name);
/// What the engine (a resolved name) offers here. Throws as above.
EngineOffer engine_offer(const std::string& name);
std::unique_ptr<Engine> create_engine(const std::string& name, const EngineConfig& config);

}  // namespace polyvisor
