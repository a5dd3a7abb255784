// System calls of a process VM that Python looks at.
#pragma once

#include <memory>

#include "bindings.hpp"
#include "process/kernel.hpp"

namespace polyvisor::python {

void bind_process_hooks(py::module_& module);

/// Shows the inquiry that waits longest to `hook`, and answers it; false: none waits. When the hook
/// raises, so does this, and the inquiry waits on.
bool serve_inquiry(process::Kernel& kernel, py::handle hook);

void watch(process::Kernel& kernel, u32 number, bool after);

/// What the program has used, and which limits it has met.
py::dict usage(process::Kernel& kernel);

/// What its trace had to drop.
u64 lost_events(process::Kernel& kernel);

/// A list of dicts: an event's fields by name, and its `line`.
py::list take_events(process::Kernel& kernel);

}  // namespace polyvisor::python
