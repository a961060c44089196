"""Where the tests run, and on what.

- The CUDA kernels run in the emulator, as the backend `cuda-emulated`.
- TRITON_INTERPRET=1: the Triton kernels run on CPU tensors, in the repaired interpreter.
- PPO_KERNELS_TEST_DEVICE=cuda: tests that make their tensors on `device.DEVICE` run there.
- PPO_KERNELS_TEST_SHARD=2/8: the second of eight parts of the tests. On a GPU most of their time is
  that of compilers, which processes share out.
"""

import os

if "PPO_KERNELS_EMULATOR_SANITIZE" in os.environ:
    os.environ.pop("LD_PRELOAD", None)  # this process's; a compiler that it starts needs none

import cuda_emulated
import pytest
import torch
from device import DEVICE

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.install()

if cuda_emulated.unavailable() is None:
    cuda_emulated.install()

if DEVICE != "cpu":
    torch.set_default_device(DEVICE)  # after the import of ppo_kernels, by `device`

NEIGHBOURS = 20  # stay together: the cells of a case share what they are held to


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config, items):
    part, parts = map(int, os.environ.get("PPO_KERNELS_TEST_SHARD", "1/1").split("/"))
    mine = [i // NEIGHBOURS % parts == part - 1 for i in range(len(items))]
    others = [item for item, chosen in zip(items, mine, strict=True) if not chosen]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item, chosen in zip(items, mine, strict=True) if chosen]


@pytest.fixture(autouse=True)
def forget_compiled(request):
    """Dynamo's limit of recompilations counts all cases of a test: its function has one code."""
    yield
    if "compile" in request.node.name:
        torch._dynamo.reset()


@pytest.fixture
def one_thread():
    """Tiny models are several times slower with more, and runs set the number themselves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """A kernel that crashed takes the process's GPU with it: say which test it was, and stop."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the GPU is lost after {item.nodeid}: {error}", returncode=3)
