#include "soft/dispatch.hpp"

#include <array>

namespace polyvisor::soft {

namespace {

struct Table {
    std::array<Operation, kOpCount> operations{};
    std::array<u8, kOpCount> bound{};

    Table() {
        for (auto list : {arithmetic_ops(), bit_ops(), data_ops(), string_ops(), branch_ops(),
                          far_ops(), segment_ops(), system_ops(), io_ops(), x87_ops(),
                          fpu_state_ops(), mmx_ops(), sse_ops(), avx_ops()}) {
            for (const OpBinding& binding : list) {
                operations[static_cast<unsigned>(binding.op)] = binding.operation;
                ++bound[static_cast<unsigned>(binding.op)];
            }
        }
    }
};

const Table& table() {
    static const Table kTable;
    return kTable;
}

}  // namespace

Operation operation_of(Op op) {
    return table().operations[static_cast<unsigned>(op)];
}

std::vector<std::string_view> wrongly_bound_rows() {
    std::vector<std::string_view> rows;
    for (unsigned n = 0; n < kOpCount; ++n) {
        if (table().bound[n] != 1) rows.push_back(op_info(static_cast<Op>(n)).id);
    }
    return rows;
}

}  // namespace polyvisor::soft
