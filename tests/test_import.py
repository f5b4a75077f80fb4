"""`import lowbit` is quick, silent, and touches nothing that the user did not ask for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowbit

SCRIPT = """
import json, sys, time
import torch
before, defaults = set(sys.modules), [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()]
flags = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()]
started = time.perf_counter()
import lowbit
seconds = time.perf_counter() - started
assert [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()] == defaults
assert flags == [
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
]
sys.stderr.write(json.dumps({
    "seconds": seconds, "new": sorted(set(sys.modules) - before), "cuda": torch.cuda.is_initialized(),
}))
"""
EXTRAS = {"transformers", "rich", "typer", "matplotlib", "jinja2", "triton", "tqdm", "tokenizers", "gguf", "pandas",
          "scipy", "safetensors.torch", "subprocess", "requests", "urllib.request"}  # fmt: skip


def imported() -> dict[str, object]:
    env = os.environ | {"PYTHONPATH": str(Path(lowbit.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    return json.loads(run.stderr)  # fails when anything but the script's line was printed


def test_import_is_quick_silent_and_lean() -> None:
    seconds = []
    for _ in range(5):
        run = imported()
        assert run["cuda"] is False
        assert not EXTRAS & {*run["new"], *(name.split(".")[0] for name in run["new"])}
        seconds.append(run["seconds"])
        if seconds[-1] <= 0.3:  # a slower run may be the fault of other processes, a quicker one is nobody's
            return
    pytest.fail(f"import lowbit took {seconds} seconds beyond torch, 0.3 allowed")


def test_the_public_names_exist() -> None:
    for name in lowbit.__all__:
        assert getattr(lowbit, name) is not None, name
    assert sorted(lowbit.__all__) == sorted(set(lowbit.__all__))
    assert torch.ops.lowbit.linear is not None
