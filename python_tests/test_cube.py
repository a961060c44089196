"""The cube op x executor x dtype x layout: every cell held to the float64 reference, on the kernel
it asked for."""

import pytest
import torch

from ppo_kernels.testing import CASES, cells, check, executors


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch.empty gives NaN: an element a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("case", "executor", "dtype", "layout"),
    [
        pytest.param(
            *(case, executor, dtype, layout),
            id=f"{case.id}-{executor}-{str(dtype).removeprefix('torch.')}-{layout}",
        )
        for case in CASES
        for executor in executors(case.function)
        for dtype, layout in cells(case, executor)
    ],
)
def test_cell(case, executor, dtype, layout):
    check(case, executor, dtype, layout)
