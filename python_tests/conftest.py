"""Backends of the tests: the CUDA kernels in the emulator (`cuda-emulated`), and with
TRITON_INTERPRET=1 the Triton kernels on CPU tensors, in the repaired interpreter."""

import os

import cuda_emulated

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.install()

if cuda_emulated.unavailable() is None:
    cuda_emulated.install()
