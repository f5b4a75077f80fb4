"""The torch.library ops that hand a linear layer its quantized input: each is one GPU kernel for few tokens and many.

A layer with a quantized activation reads every row twice and writes it once before it multiplies. What stands before
the layer holds the row in registers anyway, so these ops do both: the residual sum and RMSNorm, SiLU and product, ReLU,
or nothing, and then the quantization. `ops.linear_of_operand` multiplies what comes out.

Here are their definitions, in PyTorch, which run wherever there is no kernel: the op of decoder_ops.py, rounded to the
dtype of the activations, then `Activation.split` or its codes. Kernels give the same codes for the same rounded
numbers. M tokens, K numbers each, in any leading shape.

Every op takes `act`, an activation's spec whose scales are per row, per group, static, or of MX; `act_scale`, fp32
`(1, 1)` of a static one; and `dtype`: bf16 for levels, or the dtype of the format's codes. It gives the operand in that
dtype and fp32 scales `(M or 1, 1)`, or `(M, ceil(K / group))` for scales along K.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit import decoder_ops
from lowbit.errors import see
from lowbit.formats.activation import Activation, parse_activation
from lowbit.kernels.cpu import native
from lowbit.kernels.select import triton_missing

_LIB = torch.library.Library("lowbit", "FRAGMENT")
_HOW = "Tensor? act_scale, str act, ScalarType dtype"
_LIB.define(f"quantized(Tensor x, {_HOW}) -> (Tensor, Tensor)")
_LIB.define(f"relu_quantized(Tensor x, {_HOW}) -> (Tensor, Tensor)")
_LIB.define(f"silu_mul_quantized(Tensor gate_up, {_HOW}) -> (Tensor, Tensor)")
_LIB.define(f"rms_norm_quantized(Tensor x, Tensor weight, float eps, {_HOW}) -> (Tensor, Tensor)")
_LIB.define(f"add_rms_norm_quantized(Tensor x, Tensor y, Tensor weight, float eps, {_HOW}) -> (Tensor, Tensor, Tensor)")

Pair = tuple[Tensor, Tensor]


def _activation(act: str, dtype: torch.dtype) -> Activation:
    """The activation of a spec.

    Raises:
        ValueError: none is meant, or it does not come in `dtype`.
    """
    found = parse_activation(act)
    if found is None:
        raise ValueError("lowbit.quantized: the activation spec is empty" + see("bad-option"))
    codes = found.format.planes[0].dtype
    whole = found.format.element.bits == 8 and not found.format.has("zero_point")
    if dtype not in (torch.bfloat16, torch.float32) and (not whole or dtype != codes):
        raise ValueError(
            f"lowbit.quantized ({act}): operands are levels in bf16 or fp32"
            f"{f', or codes in {codes}' if whole else ''}; got {dtype}" + see("bad-option")
        )
    return found


def _split(x: Tensor, act_scale: Tensor | None, act: str, dtype: torch.dtype) -> Pair:
    """`x (..., K)` as operand and scales."""
    activation = _activation(act, dtype)
    flat = x.reshape(-1, x.shape[-1])
    if x.device.type == "cpu" and dtype in (torch.int8, torch.bfloat16, torch.float32):
        fast = native.quantize_rows(flat, act, codes=dtype == torch.int8)
        if fast is not None:
            return fast[0].to(dtype).view(x.shape), fast[1]
    levels = dtype in (torch.bfloat16, torch.float32)
    operand, scale = (activation.split if levels else activation.codes)(flat, act_scale)
    # A static scale comes back; an op's outputs must not be its inputs.
    return operand.to(dtype).view(x.shape), scale.clone() if scale is act_scale or activation.static else scale


def _quantized(x: Tensor, act_scale: Tensor | None, act: str, dtype: torch.dtype) -> Pair:
    return _split(x, act_scale, act, dtype)


def _relu_quantized(x: Tensor, act_scale: Tensor | None, act: str, dtype: torch.dtype) -> Pair:
    return _split(x.relu(), act_scale, act, dtype)


def _silu_mul_quantized(gate_up: Tensor, act_scale: Tensor | None, act: str, dtype: torch.dtype) -> Pair:
    return _split(decoder_ops.silu_mul(gate_up), act_scale, act, dtype)


def _rms_norm_quantized(
    x: Tensor, weight: Tensor, eps: float, act_scale: Tensor | None, act: str, dtype: torch.dtype
) -> Pair:
    return _split(decoder_ops.rms_norm(x, weight, eps), act_scale, act, dtype)


def _add_rms_norm_quantized(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, act_scale: Tensor | None, act: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    total, normed = decoder_ops.add_rms_norm(x, y, weight, eps)
    return total, *_split(normed, act_scale, act, dtype)


# On a GPU ----------------------------------------------------------------------------------------


def _on_gpu(source: str, definition: Callable[..., Any]) -> Callable[..., Any]:
    """One kernel for `source` and the quantization; the definition, whose parts are kernels, where there is none."""

    def run(*args: Any) -> Any:
        *given, act_scale, act, dtype = args
        activation = _activation(act, dtype)
        if triton_missing() or given[0].numel() == 0 or (activation.static and act_scale is None):
            return definition(*args)
        act_quant = importlib.import_module("lowbit.kernels.triton.act_quant")
        found = act_quant.after(source, given, activation, act_scale, dtype)
        return definition(*args) if found is None else found

    return run


# What comes out, for torch.compile ---------------------------------------------------------------


def _pair_fake(x: Tensor, width: int, act: str, dtype: torch.dtype) -> Pair:
    activation, m = _activation(act, dtype), math.prod(x.shape[:-1])
    rows, group = activation.scale_tile
    if not activation.grouped:
        group = None
        rows = rows if activation.format.scale_planes[0].k is None else None  # of MX and NVFP4 one number remains
    columns = 1 if group is None else -(-width // group)
    scales = x.new_empty(1 if rows is None else -(-m // rows), columns, dtype=torch.float32)
    return x.new_empty(*x.shape[:-1], width, dtype=dtype), scales


def _fake(x: Tensor, *args: Any) -> Pair:
    return _pair_fake(x, x.shape[-1], *args[-2:])


def _half_fake(gate_up: Tensor, *args: Any) -> Pair:
    return _pair_fake(gate_up, gate_up.shape[-1] // 2, *args[-2:])


def _sum_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_pair_fake(x, x.shape[-1], *args[-2:])


for _source, _definition, _out in (
    ("plain", _quantized, _fake),
    ("relu", _relu_quantized, _fake),
    ("silu_mul", _silu_mul_quantized, _half_fake),
    ("rms_norm", _rms_norm_quantized, _fake),
    ("add_rms_norm", _add_rms_norm_quantized, _sum_fake),
):
    _name = _definition.__name__.lstrip("_")
    _LIB.impl(_name, _definition, "CompositeExplicitAutograd")
    _LIB.impl(_name, _on_gpu(_source, _definition), "CUDA")
    torch.library.register_fake(f"lowbit::{_name}", _out, lib=_LIB)

quantized: Callable[..., Pair] = torch.ops.lowbit.quantized.default
relu_quantized: Callable[..., Pair] = torch.ops.lowbit.relu_quantized.default
silu_mul_quantized: Callable[..., Pair] = torch.ops.lowbit.silu_mul_quantized.default
rms_norm_quantized: Callable[..., Pair] = torch.ops.lowbit.rms_norm_quantized.default
add_rms_norm_quantized: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.lowbit.add_rms_norm_quantized.default
