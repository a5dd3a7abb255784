// The engine that needs no hardware virtualization: see docs/soft-engine.md.
#pragma once

#include "cpu/engine.hpp"

namespace polyvisor::soft {

std::unique_ptr<Engine> create_engine(const EngineConfig& config);

}  // namespace polyvisor::soft
