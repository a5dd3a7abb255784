// The only table from C++ exceptions to Python's: polyvisor.errors has a class of the same name for
// each class of base/error.hpp, and takes its fields as keywords.
#include "base/error.hpp"

#include "bindings.hpp"

namespace polyvisor::python {

namespace {

void raise(const char* name, const Error& error, const py::kwargs& fields) {
    py::object type = py::module_::import("polyvisor.errors").attr(name);
    py::object exception = type(error.what(), **fields);
    PyErr_SetObject(type.ptr(), exception.ptr());
}

void translate(std::exception_ptr pending) {
    using py::literals::operator""_a;
    try {
        if (pending) std::rethrow_exception(pending);
    } catch (const ConfigError& e) {
        raise("ConfigError", e, py::dict("field"_a = e.field));
    } catch (const MemoryRangeError& e) {
        raise("MemoryRangeError", e, py::dict("gpa"_a = e.gpa, "size"_a = e.size));
    } catch (const HostError& e) {
        raise("HostError", e, py::dict("errno"_a = e.code, "path"_a = e.path));
    } catch (const StateError& e) {
        raise("StateError", e, py::dict("field"_a = e.field));
    } catch (const EngineUnavailable& e) {
        raise("EngineUnavailable", e, py::dict("engine"_a = e.engine, "reason"_a = e.reason));
    } catch (const LimitUnavailable& e) {
        raise("LimitUnavailable", e, py::dict("controller"_a = e.controller));
    } catch (const StateMismatch& e) {
        raise("StateMismatch", e, py::dict());
    } catch (const Error& e) {
        raise("Error", e, py::dict());
    }
}

}  // namespace

void raise_current_exception() {
    try {
        translate(std::current_exception());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
}

void bind_errors(py::module_&) {
    py::register_exception_translator(translate);
}

}  // namespace polyvisor::python
