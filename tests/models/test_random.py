"""Random models: the shapes that their makers published, the formats that are asked for, weights by rows or whole."""

from dataclasses import replace

import pytest
import torch
from cases import each_format
from torch import nn

from lowbit.configs import Scheme
from lowbit.formats import parse_format
from lowbit.models import Llama
from lowbit.models import random as making
from lowbit.models.random import random_model
from lowbit.models.shapes import SHAPES, shape_of
from lowbit.specs import parse_config
from lowbit.tensor import QuantizedTensor
from lowbit.tools.generate import generate

TINY = SHAPES["tiny"]
# Parameters, in billions, embedding and a separate output projection included, as the makers say.
BILLIONS = {
    "llama-3.1-8b": 8.03, "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "qwen3-0.6b": 0.60, "qwen3-8b": 8.19,
    "mistral-7b-v0.3": 7.25, "smollm2-135m": 0.135,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_their_number_of_parameters(name):
    with torch.device("meta"):
        model = Llama(shape_of(name))
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e9 == pytest.approx(BILLIONS.get(name, 1443072e-9), rel=0.01)


def test_an_unknown_shape():
    with pytest.raises(ValueError, match=r"unknown shape 'gpt-5'; known: llama-3.1-8b, .*, tiny"):
        shape_of("gpt-5")


def linears(model):
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("config", ["int4wo-128", "int8dq", "nf4wo-64", "codebook4wo-64", "float8wo-tensor"])
def test_every_linear_is_quantized(config):
    scheme = parse_config(config).scheme
    made = random_model(TINY, scheme)
    assert set(n.split(".")[-1] for n in linears(made.model)) == {
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"
    }  # fmt: skip
    for weight in linears(made.model).values():
        assert isinstance(weight, QuantizedTensor)
        assert Scheme(weight.format, weight.act) == scheme
        assert weight.dequantize().float().std() == pytest.approx(0.02, rel=0.05)
    assert made.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(made.model.model.norm.weight, torch.ones(256, dtype=torch.bfloat16))
    assert 0 < made.quantize_seconds < made.seconds
    assert generate(made.model, torch.ones(1, 5, dtype=torch.long), 3).new_tokens == 3


def test_plain_weights_are_repeatable_and_different():
    first, again = (random_model(TINY, dtype=torch.float32) for _ in range(2))
    other = random_model(TINY, dtype=torch.float32, seed=1)
    a, b, c = (linears(m.model) for m in (first, again, other))
    assert all(torch.equal(a[n], b[n]) and not torch.equal(a[n], c[n]) for n in a)
    assert first.quantize_seconds == 0


def test_tied_embeddings():
    tied = replace(TINY, tie_embeddings=True)
    plain = random_model(tied).model
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    packed = random_model(tied, parse_config("int8wo").scheme).model
    assert isinstance(packed.lm_head.weight, QuantizedTensor)
    assert not isinstance(packed.model.embed_tokens.weight, QuantizedTensor)


@each_format
def test_rows_at_a_time_are_the_whole(fmt, monkeypatch):
    """Where a weight is quantized in parts, the result is that of the whole."""

    def weight(part):
        monkeypatch.setattr(making, "PART", part)
        clock = making._Clock(torch.device("cpu"))
        random = torch.Generator().manual_seed(0)
        return making._weight(300, 256, Scheme(fmt), torch.float32, random, clock)

    parts = weight(100 * 256)
    assert parts.shape == (300, 256)
    rows = fmt.row_blocks(300, 256, 100 * 256)
    random = torch.Generator().manual_seed(0)
    drawn = [torch.empty(stop - start, 256).normal_(0, 0.02, generator=random)
             for start, stop in (rows if making.joins(fmt) else [(0, 300)])]  # fmt: skip
    assert torch.equal(parts, QuantizedTensor.from_float(torch.cat(drawn), fmt))


def test_formats_with_something_for_the_whole_tensor():
    expected = {"int4:g128": True, "nf4:g64": True, "nvfp4": False, "codebook4:g64": False, "int8:tensor": False}
    assert {spec: making.joins(parse_format(spec)) for spec in expected} == expected


def test_progress_names_every_layer():
    seen = []
    random_model(TINY, progress=lambda done, total, name: seen.append((done, total, name)))
    assert [s[:2] for s in seen] == [(i, 10) for i in range(10)]
    assert {s[2] for s in seen} >= {"lm_head", "model.layers.1.mlp.gate_up_proj"}
