"""A small model as a checkpoint has it, and what an engine's layers must give for it: for vllm_ranks.py and
sglang_ranks.py, which build the same layers of the engine's classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import lowbit
from lowbit import QuantizedTensor, parse_config

HIDDEN, HEADS, KV_HEADS, HEAD, VOCAB, DTYPE = 512, 4, 2, 128, 504, torch.bfloat16
X = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1)).to(DTYPE)
IDS = torch.tensor([0, 3, 255, 256, 503])
Reduce = Callable[[Tensor], Tensor]


def linear(n: int, k: int = HIDDEN, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(k, n, bias=bias, dtype=DTYPE)
    with torch.no_grad():
        layer.weight.normal_(0, 0.05)
        layer.weight.mul_(1 + n % 7)  # other scales per tensor in every part of a merged layer
    return layer


class Float(nn.Module):
    """The model as a checkpoint has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN, dtype=DTYPE)
        self.attn = nn.ModuleDict({
            "q_proj": linear(HEADS * HEAD, bias=True), "k_proj": linear(KV_HEADS * HEAD, bias=True),
            "v_proj": linear(KV_HEADS * HEAD, bias=True), "o_proj": linear(HIDDEN),
        })  # fmt: skip
        self.attn["v_proj"].weight.data *= 3
        self.mlp = nn.ModuleDict({
            "gate_proj": linear(512), "up_proj": linear(512), "down_proj": linear(HIDDEN, bias=True),
        })  # fmt: skip
        self.mlp["up_proj"].weight.data *= 5
        self.fc = linear(256, bias=True)
        # Largest of its weights: 1 / (1 / (1.1875 / 2688)) is another number, so that NVFP4 needs the manifest.
        self.fc.weight.data.clamp_(-1, 1)[0, 0] = 1.1875
        self.fused = linear(512)  # gate and up in one tensor, as some models store them
        self.router = linear(8)
        self.lm_head = linear(VOCAB)

    def forward(self, x: Tensor) -> Tensor:  # what a calibration sees
        for name in ("q_proj", "k_proj", "v_proj"):
            self.attn[name](x)
        self.attn["o_proj"](x), self.mlp["gate_proj"](x), self.mlp["up_proj"](x), self.mlp["down_proj"](x)
        self.fc(x), self.fused(x), self.router(x)
        return self.lm_head(x)  # type: ignore[no-any-return]


def stored(directory: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)


def rules_of(spec: str) -> dict[str, str]:
    """One scheme for every layer that can have it, whatever the number of ranks."""
    few_rows = spec if parse_config(spec).scheme.weight.tile[0] == 1 else "int8wo"
    return {"lm_head": few_rows, "_default": spec}


def quantized(rules: dict[str, str]) -> Float:
    model = Float()
    act = parse_config(rules["_default"]).scheme.act
    statistics = lowbit.calibrate(model, [X * 2]) if act is not None and act.static else None
    lowbit.quantize_(model, rules, calibration=statistics)
    return model


def share(layer: nn.Module, dim: int, start: int, stop: int) -> QuantizedTensor:
    """Rows or columns of a layer's weight: cut by lowbit, or where it is float, quantized after it was cut."""
    w = layer.weight.detach()
    part = w[start:stop] if dim == 0 else w[:, start:stop]
    if isinstance(part, QuantizedTensor):
        return part
    return QuantizedTensor.from_float(part, *parse_config(layer.config).scheme)


def column(layers: list[nn.Module], x: Tensor, world: int, rank: int) -> Tensor:
    parts = []
    for layer in layers:
        n = layer.out_features // world
        bias = None if layer.bias is None else layer.bias[rank * n : (rank + 1) * n]
        parts.append(F.linear(x, share(layer, 0, rank * n, (rank + 1) * n), bias))
    return torch.cat(parts, dim=-1)


def row(layer: nn.Module, x: Tensor, world: int, rank: int, reduce: Reduce) -> Tensor:
    k = layer.in_features // world
    part = x[:, rank * k : (rank + 1) * k].contiguous()
    y = F.linear(part, share(layer, 1, rank * k, (rank + 1) * k), layer.bias if rank == 0 else None)
    return reduce(y) if world > 1 else y


@torch.no_grad()
def compare(ours: Float, model: Any, world: int, rank: int, reduce: Reduce) -> dict[str, str]:
    """Layer -> "equal", or how it differs.

    Args:
        model: the same layers in the engine's own classes.
        reduce: its sum over ranks.
    """
    found = {}

    def note(name: str, got: Tensor, expected: Tensor) -> None:
        if got.shape != expected.shape:
            found[name] = f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        else:
            error = (got.float() - expected.float()).abs().max()
            found[name] = "equal" if torch.equal(got, expected) else f"differs by {error} of {expected.abs().max()}"

    for m in (5, 1):
        x = X[:m]
        local = x.chunk(world, dim=-1)[rank].contiguous()
        a, b = ours.attn, ours.mlp
        note(f"qkv {m}", model.attn.qkv_proj(x)[0], column([a[f"{p}_proj"] for p in "qkv"], x, world, rank))
        note(f"gate_up {m}", model.mlp.gate_up_proj(x)[0], column([b["gate_proj"], b["up_proj"]], x, world, rank))
        note(f"o {m}", model.attn.o_proj(local)[0], row(a["o_proj"], x, world, rank, reduce))
        note(f"down {m}", model.mlp.down_proj(local)[0], row(b["down_proj"], x, world, rank, reduce))
        note(f"fc {m}", model.fc(x)[0], column([ours.fc], x, world, rank))
        at = rank * 256 // world
        halves = [share(ours.fused, 0, half + at, half + at + 256 // world) for half in (0, 256)]
        note(f"fused {m}", model.fused(x)[0], torch.cat([F.linear(x, w) for w in halves], dim=-1))
        note(f"router {m}", model.router(x)[0], column([ours.router], x, 1, 0))
        head, held = model.lm_head, model.lm_head.shard_indices
        got = head.quant_method.apply(head, x)[:, : held.num_org_elements]
        rows = share(ours.lm_head, 0, held.org_vocab_start_index, held.org_vocab_end_index)
        note(f"lm_head {m}", got, F.linear(x, rows))
    note("embedding", model.embed_tokens(IDS), ours.embed_tokens(IDS))
    n, k = ours.fc.out_features // world, HIDDEN // world
    for name, layer, expected in (
        ("fc", model.fc, share(ours.fc, 0, rank * n, (rank + 1) * n)),
        ("router", model.router, share(ours.router, 0, 0, 8)),
        ("attn.o_proj", model.attn.o_proj, share(ours.attn["o_proj"], 1, rank * k, (rank + 1) * k)),
        ("mlp.down_proj", model.mlp.down_proj, share(ours.mlp["down_proj"], 1, rank * k, (rank + 1) * k)),
    ):
        held = {key: p.detach() for key, p in layer.named_parameters() if key != "bias"}
        planes = {f"{plane}_0": t.contiguous() for plane, t in expected.planes.items()}
        planes |= {} if expected.act_scale is None else {"act_scale_0": expected.act_scale}
        same = held.keys() == planes.keys() and all(
            held[p].dtype == t.dtype and torch.equal(held[p].view(torch.uint8), t.view(torch.uint8))
            for p, t in planes.items()
        )
        found[f"planes of {name}"] = "equal" if same else f"{held} instead of {planes}"
    return found


def section_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]  # type: ignore[no-any-return]
