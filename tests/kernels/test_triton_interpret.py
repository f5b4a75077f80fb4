"""The Triton kernels in Triton's interpreter: their arithmetic is checked on machines without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not interpreted")


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    if tuple(int(v) for v in triton.__version__.split(".")[:2]) < (3, 7):
        pytest.skip("the interpreter of Triton 3.6 does not take loop bounds from NumPy 2.4")
    script = Path(__file__).with_name("triton_interpreted.py")
    # Chosen at import: another process, so that the other tests still see compiled kernels.
    run = subprocess.run(
        [sys.executable, str(script)], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
