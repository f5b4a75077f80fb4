"""What every rank does in test_parallel.py: models cut in two give what the whole ones give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases import sqnr_db
from ranks import run_rank
from torch.distributed.device_mesh import init_device_mesh

import lowbit
from lowbit import QuantizedTensor
from lowbit.models import Llama, LlamaConfig, Session, fuse_projections_, parallelize_, random_model

WORLD = 2
TINY = LlamaConfig(
    vocab_size=320, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
    max_positions=256, norm_eps=1e-5, rope_theta=10000.0,
)  # fmt: skip
VARIANTS = {
    "plain": TINY, "tied": replace(TINY, tie_embeddings=True), "biases": replace(TINY, qkv_bias=True, o_bias=True),
    "mlp biases": replace(TINY, mlp_bias=True, qk_norm=True),
}  # fmt: skip
SCHEMES = ("", "int8wo", "int4wo-32", "float8wo", "mxfp4wo", "nf4wo-64")


def made(config: LlamaConfig, scheme: str, fused: bool) -> Llama:
    """The same on every rank, with weights so large that a wrong part changes the text."""
    torch.manual_seed(0)
    model = random_model(config, None, "cpu", torch.float32).model
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4) if p.dim() == 2 else p.add_(0.1 * torch.randn(p.shape))
    if scheme:
        lowbit.quantize_(model, scheme, measure=False)
    if fused:
        fuse_projections_(model)
    return model


def same_as_whole(config: LlamaConfig, scheme: str, fused: bool) -> None:
    whole = made(config, scheme, fused)
    part = parallelize_(copy.deepcopy(whole), init_device_mesh("cpu", (WORLD,)))
    assert part.model.layers[0].self_attn.o_proj.weight.shape == (128, 64)
    assert (part.model.layers[0].mlp.gate_up_proj is not None) == (whole.model.layers[0].mlp.gate_up_proj is not None)
    if scheme:
        assert isinstance(part.lm_head.weight, QuantizedTensor)
    assert part.lm_head.weight.shape == (160, 128)
    assert part.ranks is not None
    assert part.ranks.direct == "rank 0: cpu is no NVIDIA GPU; rank 1: cpu is no NVIDIA GPU"
    ids = torch.randint(320, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = whole(ids), part(ids)
    assert got.shape == expected.shape
    assert sqnr_db(expected, got) > 80
    texts = []
    for model in (whole, part):
        session = Session(model, batch=2, capacity=64)
        session.prefill(ids)
        for _ in range(20):
            session.step()
        texts.append(session.ids)
    assert torch.equal(*texts)


def activations_are_quantized_by_part() -> None:
    whole = made(TINY, "int8dq", fused=True)
    part = parallelize_(copy.deepcopy(whole), dist.group.WORLD)
    ids = torch.randint(320, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert sqnr_db(whole(ids), part(ids)) > 20


def gradients_are_refused() -> None:
    part = parallelize_(made(TINY, "int8wo", fused=True))
    part.model.norm.weight.requires_grad_()
    ids = torch.arange(4)[None]
    with pytest.raises(ValueError, match=r"has no gradients; run it in torch.no_grad\(\)"):
        part(ids)
    part.model.norm.weight.requires_grad_(False)
    part.model.layers[0].input_layernorm.weight.requires_grad_()
    with pytest.raises(ValueError, match="has no gradients"):
        part(ids)


def errors_leave_the_model_whole() -> None:
    model = made(TINY, "int4wo-128", fused=True)
    before = {name: module for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"cannot cut .*tiles of 128"):
        parallelize_(model)
    assert model.config == TINY
    assert [*dict(model.named_modules())] == [*before]
    assert model.ranks is None
    with pytest.raises(ValueError, match="num_kv_heads = 3 is no multiple of 2 ranks"):
        parallelize_(made(replace(TINY, num_heads=6, num_kv_heads=3), "", fused=False))


def rank_main(rank: int, folder: str) -> None:
    variants = [(v, "", False) for v in VARIANTS]
    variants += [("plain", scheme, True) for scheme in SCHEMES]
    checks: dict[str, Callable[[], None]] = {
        f"{v} {scheme} {fused}": partial(same_as_whole, VARIANTS[v], scheme, fused)
        for v, scheme, fused in [*variants, ("tied", "int8wo", True)]
    }
    for check in (activations_are_quantized_by_part, gradients_are_refused, errors_leave_the_model_whole):
        checks[check.__name__] = check
    run_rank(rank, WORLD, folder, checks)
