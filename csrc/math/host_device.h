// Formulas in this folder compile for the host, once per instruction set, and for the device.
#pragma once

#ifdef __CUDACC__
#define PPOK_HD __host__ __device__
#define PPOK_HD_INLINE __host__ __device__ __forceinline__
// Before a template for both whose argument may be a function of one.
#define PPOK_EITHER _Pragma("nv_exec_check_disable")
#else
#define PPOK_HD
#define PPOK_HD_INLINE inline __attribute__((always_inline))
#define PPOK_EITHER
#endif
