#include "process/process.hpp"

#include "process/loader.hpp"
#include "process/thread.hpp"

namespace polyvisor::process {

Process::Process(Kernel& kernel, int number, int parent_pid, std::shared_ptr<Vm> machine)
    : pid(number),
      parent(parent_pid),
      group(number),
      session(number),
      vm(std::move(machine)),
      timers(*this, kernel.alarms()),
      kernel_(kernel) {}

void Process::inherit(const Process& from) {
    group = from.group;
    session = from.session;
    descriptors = from.descriptors;
    directory = from.directory;
    umask = from.umask;
    executable = from.executable;
    base = from.base;
    arguments = from.arguments;
    signals.actions = from.signals.actions;
}

void Process::exit(End how) {
    if (exiting) return;
    exiting = true;
    end = std::move(how);
    for (Thread* thread : threads) {
        thread->ending = true;
        thread->interrupt();
    }
}

int Process::load(const LoadRequest& request, GeneralRegisters& registers) {
    Start start;
    LoadRequest placed = request;
    placed.seed = kernel_.next_seed();
    if (int error = load_program(kernel_.tree(), space(), placed, start)) return error;
    registers = {};
    registers.rip = start.rip;
    registers.gpr[kRsp] = start.rsp;
    executable = start.path;
    base = start.base;
    arguments = request.arguments;
    return 0;
}

}  // namespace polyvisor::process
