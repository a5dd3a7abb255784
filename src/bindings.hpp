// What the binding files share: the bind_ functions, how native code holds the GIL, and how
// Python's buffers and timeouts arrive.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <span>

#include "base/types.hpp"
#include "machine/run_control.hpp"

namespace polyvisor::python {

namespace py = pybind11;

void bind_errors(py::module_& module);
void bind_engines(py::module_& module);
void bind_process(py::module_& module);
void bind_host(py::module_& module);
void bind_memory(py::module_& module);
void bind_mmu(py::module_& module);
void bind_mmu_bulk(py::module_& module);
void bind_cpu(py::module_& module);
void bind_bus(py::module_& module);
void bind_machine(py::module_& module);
void bind_net(py::module_& module);
void bind_debug(py::module_& module);
void bind_statistics(py::module_& module);
void bind_console(py::module_& module);
void bind_virtio(py::module_& module);
void bind_block(py::module_& module);
void bind_py_virtio(py::module_& module);
void bind_cgroup(py::module_& module);

/// Makes the C++ exception being handled Python's pending one: for functions that Python calls
/// without pybind11 between.
void raise_current_exception();

/// Holds the GIL, on any thread. On a vCPU's thread the Python thread state is made once and kept,
/// which is most of what entering Python would cost.
class Gil {
  public:
    Gil();
    ~Gil();
    Gil(const Gil&) = delete;
    Gil& operator=(const Gil&) = delete;

    /// First and last on a thread that will enter Python often.
    static void keep_thread_state();
    static void drop_thread_state();

  private:
    PyGILState_STATE state_;
};

/// The bytes of any contiguous buffer, held while this lives.
class BufferView {
  public:
    BufferView(py::handle object, bool writable);
    ~BufferView() { PyBuffer_Release(&view_); }
    BufferView(const BufferView&) = delete;
    BufferView& operator=(const BufferView&) = delete;
    std::span<u8> bytes() const {
        return {static_cast<u8*>(view_.buf), static_cast<std::size_t>(view_.len)};
    }

  private:
    Py_buffer view_;
};

/// Calls `step(slice)` without the GIL until it returns true or `timeout` seconds (none: no limit)
/// are over, and lets Python's signal handlers (Ctrl-C) run in between. Returns the last answer.
template <class Step>
bool wait_interruptibly(std::optional<double> timeout, Step step) {
    using Clk = std::chrono::steady_clock;
    constexpr RunControl::Duration kSlice = std::chrono::milliseconds(50);
    // Beyond 30 years is for ever; the arithmetic below must not overflow.
    bool limited = timeout && *timeout < 1e9;
    auto end = Clk::now();
    if (limited && *timeout > 0) {
        end += std::chrono::nanoseconds(static_cast<s64>(*timeout * 1e9));
    }
    for (;;) {
        auto slice = kSlice;
        if (limited) {
            slice =
                std::clamp<RunControl::Duration>(end - Clk::now(), RunControl::Duration(0), kSlice);
        }
        bool done;
        {
            py::gil_scoped_release release;
            done = step(slice);
        }
        if (done) return true;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (limited && Clk::now() >= end) return false;
    }
}

}  // namespace polyvisor::python
