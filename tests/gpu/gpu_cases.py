"""What the GPU tests share: weights of every format on the GPU, inputs that are hard to sum, the fp64 answer."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from cases import sqnr_db, weights
from torch import Tensor

from lowbit import QuantizedTensor
from lowbit.formats import Format
from lowbit.formats.activation import Activation

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
