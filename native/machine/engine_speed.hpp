// How fast an engine really is: measured with a guest of its own, as the kind and name of a host's
// virtualization say little about it.
#pragma once

#include <functional>
#include <memory>

#include "cpu/engine.hpp"

namespace polyvisor {

/// Million instructions per second of a counting loop in real mode, thus at ring 0. Takes 1 to 10
/// ms of CPU time besides what making and ending a machine takes. `offer` is the engine's. Throws
/// what creating and running it throws, and EngineUnavailable with reason "broken" when the loop
/// does not come to its end.
double measure_speed(const std::function<std::unique_ptr<Engine>(const EngineConfig&)>& create,
                     const EngineOffer& offer);

}  // namespace polyvisor
