"""That the build of `make test-sanitize` does stop at the first bad access."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    "PPO_KERNELS_SANITIZED" not in os.environ, reason="not the sanitized build"
)

READ_TOO_FAR = """
import torch
from ppo_kernels.cpu import _C
from ppo_kernels.native import pointer, rows
x, out, count = torch.zeros(64), torch.zeros(()), torch.zeros((), dtype=torch.float64)
_C.masked_reduce(rows(x), None, 1, {n}, 1, True, False, pointer(out), pointer(count), 1)
print("done")
"""


@pytest.mark.parametrize("n", [64, 65])
def test_a_read_past_the_end_is_caught(n):
    run = subprocess.run(
        [sys.executable, "-c", READ_TOO_FAR.format(n=n)], capture_output=True, text=True
    )
    if n == 64:
        assert run.returncode == 0, run.stderr
        assert "done" in run.stdout
    else:
        assert run.returncode != 0
        assert "AddressSanitizer: heap-buffer-overflow" in run.stderr
