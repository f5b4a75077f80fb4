"""After `warmup`, a new process with empty caches captures CUDA graphs at once; without it, it is told what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lowbit

MODEL = """
import os
from pathlib import Path

import torch
import lowbit

TOKENS = (1, 7, 16, 40, 300)
torch.manual_seed(0)
torch.set_grad_enabled(False)
model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=i % 2 == 0) for i in range(6))).bfloat16()
configs = ("int4wo-128", "int8wo", "float8dq-row", "int8dq", "nvfp4dq", "int3wo-64")
lowbit.quantize_(model, dict(zip("012345", configs)), device="cuda")


def capture(m):
    x, graph = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    return x, y, graph
"""
WARM = """
def compiled():
    return {str(f) for name in ("LOWBIT_CACHE", "TRITON_CACHE_DIR") for f in Path(os.environ[name]).rglob("*.cubin")}


done = lowbit.warmup(model, TOKENS)
kernels = compiled()
assert kernels, done
for m in TOKENS:
    x, y, graph = capture(m)
    assert compiled() == kernels, f"something was compiled for M = {m} after the warmup"
    for _ in range(2):
        x.normal_()
        y.fill_(7)
        graph.replay()
        assert torch.equal(y, model(x)), f"M = {m}"
print("captured", *done.kernels)
"""
COLD = """
try:
    capture(1)
except lowbit.UnsupportedError as error:
    print(error)
"""


def run(program: str, tmp_path: Path) -> str:
    caches = {name: str(tmp_path / name) for name in ("LOWBIT_CACHE", "TRITON_CACHE_DIR")}
    env = os.environ | caches | {"PYTHONPATH": str(Path(lowbit.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_graphs_can_be_captured_after_a_warmup(tmp_path: Path) -> None:
    words = run(MODEL + WARM, tmp_path).split()
    assert words[0] == "captured"
    assert len(words) > 2, "several kernels were meant to run"


def test_without_a_warmup_the_error_names_it(tmp_path: Path) -> None:
    message = run(MODEL + COLD, tmp_path).strip()
    assert "lowbit.warmup(model, tokens)" in message
    assert message.endswith("[lowbit: no-kernel]")
