"""Two emulated kernels under ThreadSanitizer: a scan that looks back, rows that are split.

`make test-sanitize` has them all under AddressSanitizer and UBSan, `make verify-all` under each.
"""

import cuda_emulated
import cuda_sanitized
import pytest

pytestmark = pytest.mark.skipif(
    cuda_emulated.unavailable() is not None, reason=str(cuda_emulated.unavailable())
)
TESTS = cuda_sanitized.TESTS
SPLIT_ROWS = f"{TESTS}/test_cuda_emulated.py::test_bits_depend_on_no_schedule[shape1-dtype1]"
LOOK_BACK = f"{TESTS}/test_cuda_scan.py::test_bits_do_not_depend_on_the_place_in_a_tile[2048-carry]"


def test_no_races():
    tests = [SPLIT_ROWS, LOOK_BACK]
    done = cuda_sanitized.run("thread", tests, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_everything_is_of_the_kernels():
    files = [argument.rpartition("/")[2] for argument in cuda_sanitized.everything("thread")]
    assert {"test_cube.py", "test_cuda_scan.py", "test_gae.py", "-k"} <= set(files)
    assert "test_cuda_sanitized.py" not in files
