// The engine on /dev/kvm: see docs/kvm-engine.md.
#pragma once

#include <memory>

#include "cpu/engine.hpp"
#include "kvm/system.hpp"

namespace polyvisor::kvm {

std::unique_ptr<Engine> create_engine(std::shared_ptr<const System> system,
                                      const EngineConfig& config);

}  // namespace polyvisor::kvm
