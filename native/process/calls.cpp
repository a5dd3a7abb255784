#include "process/calls.hpp"

namespace polyvisor::process {

namespace {

constexpr u32 kNumbers = 512;

struct Name {
    u32 number;
    const char* name;
};
constexpr Name kNames[] = {
#include <call_names.inc>  // made by CMake
};

std::array<const Call*, kNumbers> make_table() {
    std::array<const Call*, kNumbers> table{};
    for (auto calls :
         {memory_calls(), file_calls(), copy_calls(), descriptor_calls(), open_calls(),
          lookup_calls(), name_calls(), attribute_calls(), event_calls(), socket_calls(),
          connection_calls(), socket_option_calls(), message_calls(), process_calls(), task_calls(),
          time_calls(), signal_calls(), timer_calls()}) {
        for (const Call& call : calls) table[call.number] = &call;
    }
    return table;
}

const std::array<const Call*, kNumbers>& table() {
    static const auto made = make_table();
    return made;
}

}  // namespace

s64 serve_system_call(Thread& thread, u32 number, const Arguments& arguments) {
    const Call* call = number < kNumbers ? table()[number] : nullptr;
    return call == nullptr ? -ENOSYS : call->handler(thread, arguments);
}

bool is_served(u32 number) {
    return number < kNumbers && table()[number] != nullptr;
}

std::string system_call_name(u32 number) {
    static const auto names = [] {
        std::array<const char*, kNumbers> table{};
        for (const Name& name : kNames) table[name.number] = name.name;
        return table;
    }();
    if (number < kNumbers && names[number] != nullptr) return names[number];
    return "syscall_" + std::to_string(number);
}

std::optional<u32> system_call_number(const std::string& name) {
    for (const Name& known : kNames) {
        if (name == known.name) return known.number;
    }
    return std::nullopt;
}

}  // namespace polyvisor::process
