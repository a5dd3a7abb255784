// Fused multiply-add.
#include "soft/simd.hpp"

namespace polyvisor::soft {

#define PV_FMA_PACKED(NAME, op)           \
    PV_FMA128(NAME##_Vdq_Hdq_Wdq, 16, op) \
    PV_FMA256(NAME##_Vqq_Hqq_Wqq, 32, op)
#define PV_FMA_PACKED_ORDERS(NAME, op)     \
    PV_FMA_PACKED(NAME##132PS, op "132ps") \
    PV_FMA_PACKED(NAME##213PS, op "213ps") \
    PV_FMA_PACKED(NAME##231PS, op "231ps") \
    PV_FMA_PACKED(NAME##132PD, op "132pd") \
    PV_FMA_PACKED(NAME##213PD, op "213pd") \
    PV_FMA_PACKED(NAME##231PD, op "231pd")
#define PV_FMA_SCALAR_ORDERS(NAME, op)                \
    PV_FMA128(NAME##132SS_Vss_Hss_Wss, 4, op "132ss") \
    PV_FMA128(NAME##213SS_Vss_Hss_Wss, 4, op "213ss") \
    PV_FMA128(NAME##231SS_Vss_Hss_Wss, 4, op "231ss") \
    PV_FMA128(NAME##132SD_Vsd_Hsd_Wsd, 8, op "132sd") \
    PV_FMA128(NAME##213SD_Vsd_Hsd_Wsd, 8, op "213sd") \
    PV_FMA128(NAME##231SD_Vsd_Hsd_Wsd, 8, op "231sd")
PV_FMA_PACKED_ORDERS(VFMADD, "vfmadd")
PV_FMA_PACKED_ORDERS(VFMSUB, "vfmsub")
PV_FMA_PACKED_ORDERS(VFNMADD, "vfnmadd")
PV_FMA_PACKED_ORDERS(VFNMSUB, "vfnmsub")
PV_FMA_PACKED_ORDERS(VFMADDSUB, "vfmaddsub")
PV_FMA_PACKED_ORDERS(VFMSUBADD, "vfmsubadd")
PV_FMA_SCALAR_ORDERS(VFMADD, "vfmadd")
PV_FMA_SCALAR_ORDERS(VFMSUB, "vfmsub")
PV_FMA_SCALAR_ORDERS(VFNMADD, "vfnmadd")
PV_FMA_SCALAR_ORDERS(VFNMSUB, "vfnmsub")

}  // namespace polyvisor::soft
