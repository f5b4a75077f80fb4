"""What the GPU tests share: weights of every format, inputs that are hard to sum, the fp64 answer, small models."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from cases import sqnr_db, weights
from torch import Tensor

import lowbit
from lowbit import QuantizedTensor
from lowbit.formats import Format
from lowbit.formats.activation import Activation
from lowbit.models import Llama, LlamaConfig
from lowbit.models.random import random_model

# fp32 products are exact to many digits; bf16 and fp16 are held to the format's own number.
FP32_SQNR_DB = 100.0


@lru_cache(maxsize=64)
def weight_on_gpu(fmt: Format, n: int, k: int, act: Activation | None = None, static: bool = False) -> QuantizedTensor:
    """Quantized on the CPU, where every bit is defined; rows of zeros and a channel of outliers included."""
    w = weights("normal", n, k, seed=n + k)
    if n > 4:
        w[1] = 0
    w[-1] *= 50
    scale = torch.full((1, 1), 0.013) if static else None
    return QuantizedTensor.from_float(w, fmt, act, scale).to("cuda")


def inputs(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """`(m, k)` on the GPU: normal numbers, an outlier column, a row of zeros where there are several.

    Outliers are 1e4 times the rest; in fp16, where the products would be infinite, 100 times.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    if k > 8:
        x[:, 5] *= 100 if dtype == torch.float16 else 1e4
    if m > 3:
        x[2] = 0
    return x.to(dtype).cuda()


def expected(x: Tensor, w: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """fp64 product with the dequantized weight and, if the weight asks for it, the dequantized activation."""
    flat = x.reshape(-1, x.shape[-1])
    if w.act is not None:
        flat = w.act.format.dequantize(w.act.quantize(flat, w.act_scale), *flat.shape)
    dense = w.format.dequantize(w.planes, *w.shape).double()
    y = F.linear(flat.double(), dense, None if bias is None else bias.double())
    return y.view(*x.shape[:-1], w.shape[0])


def assert_close(y: Tensor, reference: Tensor, fmt: Format, dtype: torch.dtype) -> None:
    limit = FP32_SQNR_DB if dtype == torch.float32 else fmt.kernel_sqnr_db
    assert y.dtype == dtype
    assert y.shape == reference.shape
    got = sqnr_db(reference, y)
    assert got >= limit, f"{fmt.spec} {tuple(y.shape)} {dtype}: {got:.1f} dB, at least {limit} dB expected"


# Models that generate ------------------------------------------------------------------------------

SMALL = LlamaConfig(
    vocab_size=1000, hidden_size=512, intermediate_size=1024, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=64,
    max_positions=2048, norm_eps=1e-5, rope_theta=10000.0,
)  # fmt: skip
VARIANTS = {
    "plain": SMALL, "qwen3": replace(SMALL, qk_norm=True, head_dim=128), "biases": replace(SMALL, qkv_bias=True),
    "tied": replace(SMALL, tie_embeddings=True), "head_dim 96": replace(SMALL, head_dim=96),
}  # fmt: skip


def made(config: LlamaConfig, spec: str | None, dtype: torch.dtype = torch.bfloat16) -> Llama:
    """Weights ten times as large as usual, so that a wrong bit changes the text."""
    model = random_model(config, None, "cuda", dtype).model
    for p in model.parameters():
        if p.dim() == 2:
            p.mul_(5)
    if spec is not None:
        lowbit.quantize_(model, spec)
    return model


def prompts(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(1000, (batch, tokens), generator=torch.Generator().manual_seed(seed)).cuda()
