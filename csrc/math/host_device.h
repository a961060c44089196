// Formulas in this folder compile for the host, once per instruction set, and for the device.
#pragma once

#ifdef __CUDACC__
#define PPOK_HD __host__ __device__
#else
#define PPOK_HD
#endif
