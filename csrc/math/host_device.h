// Formulas in this folder compile for the host, once per instruction set, and for the device.
#pragma once

#ifdef __CUDACC__
#define PPOK_HD __host__ __device__
#define PPOK_HD_INLINE __host__ __device__ __forceinline__
#else
#define PPOK_HD
#define PPOK_HD_INLINE inline __attribute__((always_inline))
#endif
