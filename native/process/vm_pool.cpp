#include "process/vm_pool.hpp"

#include <unistd.h>

#include <system_error>

#include "base/error.hpp"

namespace polyvisor::process {

namespace {

// Emptied; else null, and it is closed.
std::unique_ptr<Vm> recycled(std::unique_ptr<Vm> machine) {
    try {
        if (machine->recycle()) return machine;
    } catch (const Error&) {
        // The host did not take its memory back: it does when the machine is closed.
    }
    return nullptr;
}

}  // namespace

VmPool::VmPool(VmConfig config, std::size_t count)
    : config_(std::move(config)),
      count_(count),
      pid_(::getpid()),
      shared_(std::make_unique<Shared>()) {
    shared_->idle.reserve(count);
    try {
        shared_->thread = std::thread([this] { main(); });
    } catch (const std::system_error& error) {
        throw HostError(error.code().value(), {}, "cannot start the thread of a pool of machines");
    }
}

VmPool::~VmPool() {
    close();
    if (!ours()) (void)shared_.release();
}

// A machine belongs to the host's process that made it.
bool VmPool::ours() const {
    return ::getpid() == pid_;
}

void VmPool::close() {
    if (!ours()) return;
    {
        std::lock_guard lock(shared_->mutex);
        shared_->closing = true;
    }
    shared_->changed.notify_all();
    if (shared_->thread.joinable()) shared_->thread.join();
}

std::size_t VmPool::idle() const {
    std::lock_guard lock(shared_->mutex);
    return shared_->idle.size();
}

std::shared_ptr<Vm> VmPool::take() {
    std::unique_ptr<Vm> machine;
    if (ours()) {
        std::unique_lock lock(shared_->mutex);
        shared_->failed = false;
        ++shared_->in_use;
        if (!shared_->idle.empty()) {
            machine = std::move(shared_->idle.back());
            shared_->idle.pop_back();
        } else if (!shared_->returned.empty()) {  // in time to be emptied here
            machine = std::move(shared_->returned.back());
            shared_->returned.pop_back();
            --shared_->in_use;
            lock.unlock();
            machine = recycled(std::move(machine));
        }
        shared_->changed.notify_one();
    }
    try {
        if (machine == nullptr) machine = std::make_unique<Vm>(config_);
        auto give = [pool = weak_from_this()](Vm* used) {
            std::unique_ptr<Vm> owned(used);
            if (auto there = pool.lock()) there->give_back(std::move(owned));
        };
        return {machine.release(), std::move(give)};
    } catch (...) {
        if (ours()) {
            std::lock_guard lock(shared_->mutex);
            --shared_->in_use;
        }
        throw;
    }
}

void VmPool::give_back(std::unique_ptr<Vm> machine) {
    if (!ours()) return;
    std::unique_lock lock(shared_->mutex);
    if (shared_->closing) {
        lock.unlock();
        machine.reset();
        return;
    }
    shared_->returned.push_back(std::move(machine));
    lock.unlock();
    shared_->changed.notify_one();
}

void VmPool::main() {
    std::unique_lock lock(shared_->mutex);
    const auto short_of = [this] {
        return !shared_->failed && shared_->idle.size() + shared_->in_use < count_;
    };
    while (true) {
        shared_->changed.wait(
            lock, [&] { return shared_->closing || !shared_->returned.empty() || short_of(); });
        std::unique_ptr<Vm> machine;
        bool failed = false;
        if (!shared_->returned.empty()) {
            machine = std::move(shared_->returned.back());
            shared_->returned.pop_back();
            const std::size_t others = shared_->in_use - shared_->returned.size() - 1;
            const bool wanted = !shared_->closing && shared_->idle.size() + others < count_;
            lock.unlock();
            if (wanted) {
                machine = recycled(std::move(machine));
            } else {
                machine.reset();
            }
        } else if (shared_->closing) {
            break;
        } else {
            ++shared_->in_use;
            lock.unlock();
            try {
                machine = std::make_unique<Vm>(config_);
                machine->make_ready();
            } catch (const std::exception&) {
                failed = true;  // take() meets it, too, and has somebody to tell
            }
        }
        lock.lock();
        shared_->failed = shared_->failed || failed;
        --shared_->in_use;
        if (machine != nullptr) shared_->idle.push_back(std::move(machine));
    }
    const std::vector<std::unique_ptr<Vm>> rest = std::move(shared_->idle);
    shared_->idle.clear();
    lock.unlock();
}

std::shared_ptr<Vm> make_vm(const VmConfig& config) {
    return config.pool ? config.pool->take() : std::make_shared<Vm>(config);
}

}  // namespace polyvisor::process
