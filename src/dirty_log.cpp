// The dirty log in Python: who uses it, and pages as ranges and bitmaps.
#include <bit>

#include "handles.hpp"

namespace polyvisor::python {

namespace {

struct Written {
    const GuestMemory::Region* region;
    std::vector<u64> bitmap;
};

/// Calls found(first page, pages) for each run of set bits.
template <class Function>
void for_each_run(const std::vector<u64>& bitmap, Function found) {
    u64 begin = 0, length = 0;  // of the run that may go on
    for (u64 word = 0; word < bitmap.size(); ++word) {
        for (unsigned at = 0; at < 64;) {
            u64 rest = bitmap[word] >> at;
            if (rest == 0) break;
            at += static_cast<unsigned>(std::countr_zero(rest));
            unsigned run = static_cast<unsigned>(std::countr_one(bitmap[word] >> at));
            u64 page = word * 64 + at;
            if (length == 0 || begin + length != page) {
                if (length != 0) found(begin, length);
                begin = page;
                length = 0;
            }
            length += run;
            at += run;
        }
    }
    if (length != 0) found(begin, length);
}

}  // namespace

PyDirtyLog::PyDirtyLog(const std::shared_ptr<Core>& core, std::string machine)
    : core_(core), machine_(std::move(machine)), pid_(::getpid()) {
    DirtyLog& log = core->machine().engine().dirty_log();
    method_ = log.method();
    if (!log.claim()) {
        throw StateMismatch("the dirty log of machine '" + machine_ +
                            "' is in use, and what one user fetches another would miss; stop() "
                            "that one first");
    }
    try {
        py::gil_scoped_release release;
        log.start();
    } catch (...) {
        log.release();
        throw;
    }
}

PyDirtyLog::~PyDirtyLog() {
    try {
        stop();
    } catch (const std::exception&) {
        // The kernel goes on logging what nobody asks for.
    }
}

void PyDirtyLog::stop() {
    if (::getpid() != pid_ || !using_.exchange(false)) return;
    py::gil_scoped_release release;  // the last owner of the machine may be here
    auto core = core_.lock();
    if (!core) return;
    DirtyLog& log = core->machine().engine().dirty_log();
    try {
        log.stop();
    } catch (...) {
        log.release();
        throw;
    }
    log.release();
}

py::tuple PyDirtyLog::fetch() {
    std::vector<Written> written;
    {
        py::gil_scoped_release release;
        auto core = core_.lock();
        if (!core || ::getpid() != pid_) {
            throw StateMismatch("machine '" + machine_ + "' is closed, and its dirty log with it");
        }
        if (!using_) throw StateMismatch("this dirty log was stopped; begin another one");
        DirtyLog& log = core->machine().engine().dirty_log();
        for (const auto& region : core->machine().memory()->regions()) {
            written.push_back({region.get(), std::vector<u64>(region->bitmap_words())});
            log.fetch(*region, written.back().bitmap);
        }
    }
    py::list ranges, bitmaps;
    u64 end = 0;
    for (const Written& part : written) {
        u64 start = part.region->start.value;
        for_each_run(part.bitmap, [&](u64 page, u64 pages) {
            u64 gpa = start + (page << kPageShift), size = pages << kPageShift;
            if (end == gpa && !ranges.empty()) {  // it goes on from the region before
                auto last = py::cast<std::pair<u64, u64>>(ranges[ranges.size() - 1]);
                ranges[ranges.size() - 1] = py::make_tuple(last.first, last.second + size);
            } else {
                ranges.append(py::make_tuple(gpa, size));
            }
            end = gpa + size;
        });
        auto bytes = static_cast<std::size_t>((part.region->pages() + 7) / 8);
        bitmaps.append(py::make_tuple(
            start, py::bytes(reinterpret_cast<const char*>(part.bitmap.data()), bytes)));
    }
    return py::make_tuple(ranges, bitmaps);
}

}  // namespace polyvisor::python
