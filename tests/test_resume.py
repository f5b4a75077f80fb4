"""A run with a journal that was broken off goes on, and nothing tells its result from that of a run that was not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from faults.subjects import same_state
from tiny_llama import CONFIG, tiny_ids, tiny_llama
from torch import Tensor, nn

import lowbit.quantize as quantizing
from lowbit import QuantizedTensor, Report, calibrate, quantize_
from lowbit.recipe import parse_recipe

DEEP = replace(CONFIG, num_layers=3)
MIXED = {"_default": "int4wo-16", "re:.*down_proj": "int8dq", "re:.*1.*o_proj": None, "lm_head": "int8wo"}
BATCHES = [tiny_ids(seed=s) for s in (1, 2)]


class Killed(BaseException):
    pass


def run(
    journal: Path | None, stop: int | None = None, make: Callable[[], nn.Module] = lambda: tiny_llama(DEEP),
    config: Any = MIXED, **options: Any,
) -> tuple[nn.Module, Report]:  # fmt: skip
    """`quantize_`, broken off before layer number `stop`."""

    def progress(done: int, layers: int, name: str) -> None:
        if done == stop:
            raise Killed

    model = make()
    options = {"algorithm": "gptq", "batches": BATCHES} | options
    return model, quantize_(model, config, journal=journal, progress=progress, **options)


def resumed(journal: Path, stops: tuple[int, ...], **options: Any) -> tuple[nn.Module, Report]:
    for stop in stops:
        with pytest.raises(Killed):
            run(journal, stop, **options)
    return run(journal, **options)


def assert_same(a: tuple[nn.Module, Report], b: tuple[nn.Module, Report]) -> None:
    assert same_state(dict(a[0].state_dict()), dict(b[0].state_dict()))
    assert a[1].layers == b[1].layers


@contextmanager
def counted() -> Iterator[list[None]]:
    """How many weights are quantized."""
    calls: list[None] = []
    real = quantizing.quantize_weight

    def counting(*arguments: Any) -> Any:
        calls.append(None)
        return real(*arguments)

    with mock.patch.object(quantizing, "quantize_weight", counting):
        yield calls


@pytest.mark.parametrize(
    "algorithm",
    ["gptq", "awq+hqq", "smoothquant", "align", "awq+align", "smoothquant+align", "rotation+awq+align+gptq"],
)
def test_bits_of_an_uninterrupted_run(tmp_path: Path, algorithm: str) -> None:
    """Killed in the second block, in the third, and behind the last, before the output projection."""
    whole = run(None, algorithm=algorithm)
    assert whole[1].from_journal == 0
    with counted() as calls:
        last = resumed(tmp_path, (8, 13, 20), algorithm=algorithm)
    assert_same(last, whole)
    # Seven layers of a block, six of the second; what was begun of a block is lost.
    assert last[1].from_journal == 20
    assert len(calls) == (7 + 1) + 6 + 7 + 1
    assert_same(run(tmp_path, algorithm=algorithm), whole)


@pytest.mark.parametrize("config", ["mxfp4wo", "nvfp4dq", "nf4wo-64-dq", "int8sq", "float8dq-row"])
def test_formats_with_other_planes(tmp_path: Path, config: str) -> None:
    wide = replace(DEEP, hidden_size=96, intermediate_size=128, head_dim=16)
    statistics = calibrate(tiny_llama(wide), BATCHES)
    options = {"make": lambda: tiny_llama(wide, torch.bfloat16), "config": config, "calibration": statistics}
    last = resumed(tmp_path, (9,), **options)
    assert_same(last, run(None, **options))
    assert last[1].from_journal == 7


class Block(nn.Module):
    """Its `spare` never runs."""

    def __init__(self, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.linear, self.shared, self.spare = (nn.Linear(16, 16) for _ in range(3))
        if weight is not None:
            self.shared.weight = weight

    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        out: Tensor = x + torch.tanh(self.linear(x)) + self.shared(x) * more
        return out


class Model(nn.Module):
    """Two of its three blocks share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = Block()
        self.layers = nn.ModuleList([first, Block(), Block(first.shared.weight)])

    def forward(self, x: Tensor) -> Tensor:
        more = x.mean()
        for layer in self.layers:
            x = layer(x, more=more)
        return x


@pytest.mark.parametrize("stop", [2, 3, 5, 6, 8])
def test_shared_weights_and_layers_without_inputs(tmp_path: Path, stop: int) -> None:
    options = {"make": lambda: Model().requires_grad_(False), "config": "int4wo-16"}
    options |= {"batches": [torch.randn(32, 16, generator=torch.Generator().manual_seed(1))]}
    whole = run(None, **options)
    assert "no inputs seen" in str(whole[1])
    last = resumed(tmp_path, (stop,), **options)
    assert_same(last, whole)
    model = last[0]
    assert isinstance(model, Model)
    assert model.layers[0].shared.weight is model.layers[2].shared.weight  # type: ignore[union-attr]
    assert last[1].from_journal == 2 * min(stop // 2, 3)


def changed_model() -> nn.Module:
    model = tiny_llama(DEEP)
    model.model.layers[2].mlp.up_proj.weight[3, 4] *= 1.001
    return model


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"make": changed_model}, "weights sha256: "),
        ({"batches": BATCHES[:1]}, "inputs batches: 2 there, 1 here"),
        ({"batches": [BATCHES[0], BATCHES[1].flip(1)]}, "inputs sha256: "),
        ({"forward": lambda m, ids: m(ids[:, 1:])}, "inputs sha256: "),
        (
            {"config": MIXED | {"_default": "int4wo-32"}},
            r"layers model\.layers\.0\.mlp\.gate_proj: int4:g16:asym there",
        ),
        ({"algorithm": "awq+gptq"}, r"algorithm: gptq there, awq\+gptq here"),
        ({"on_nonfinite": "zero"}, "on_nonfinite: error there, zero here"),
        ({"measure": False}, "measure: True there, False here"),
    ],
)
def test_another_run_is_refused_before_anything_is_done(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(Killed):
        run(tmp_path, 8)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model = change.get("make", lambda: tiny_llama(DEEP))()
    with pytest.raises(ValueError, match=f"is of another run.*{says}.*journal-refused"):
        run(tmp_path, **change | {"make": lambda: model})
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_another_number_of_threads_is_another_run(tmp_path: Path) -> None:
    """It changes the last bits of sums."""
    with pytest.raises(Killed):
        run(tmp_path, 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(ValueError, match=rf"device: .*{threads} threads there, .*{threads + 1} threads here"):
            run(tmp_path)
    finally:
        torch.set_num_threads(threads)


def test_a_model_that_is_quantized_in_part_is_another(tmp_path: Path) -> None:
    model = tiny_llama(DEEP)
    with pytest.raises(Killed):
        run(tmp_path, 8, make=lambda: model)
    with pytest.raises(ValueError, match=r"is of another run.*from the original model"):
        run(tmp_path, make=lambda: model, on_unsupported="skip")


def test_a_damaged_block_is_done_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, 14)
    second = next(tmp_path.glob("block-00001-*"))
    raw = bytearray(second.read_bytes())
    raw[-1] ^= 1
    second.write_bytes(raw)
    with pytest.warns(UserWarning, match="block 1 is damaged"):
        last = run(tmp_path)
    assert_same(last, run(None))
    assert last[1].from_journal == 7


@pytest.mark.parametrize("algorithm", ["rtn", "mse", "hqq", "rotation"])
def test_what_does_not_go_by_blocks_takes_no_journal(tmp_path: Path, algorithm: str) -> None:
    assert not parse_recipe(algorithm).needs_batches
    with pytest.raises(ValueError, match=r"a journal keeps blocks.*bad-option"):
        quantize_(tiny_llama(), "int4wo-16", algorithm=algorithm, journal=tmp_path / "journal")
    assert not (tmp_path / "journal").exists()
