"""GPTQ: rounds a weight column by column and moves the columns still to come, so that the output stays what it was.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323. For a layer with inputs X, `H = X^T X`, it looks for codes with a small

    tr((W - Wq) H (W - Wq)^T) = ||X W^T - X Wq^T||^2                                      (equation 1)

Quantizing column q and moving the columns F that are not quantized yet by

    delta_F = -(w_q - quant(w_q)) / [H_F^-1]_qq * (H_F^-1)_{q,:}                          (equation 2)

is the best answer to the error of q. All the inverses `H_F^-1` that this needs are in one factor, the upper
triangular U with `H^-1 = U^T U` (step 3, "Cholesky reformulation"): of the columns q.., the inverse's first row is
`U_qq * U_q,q..`. So Algorithm 1 is, with `err = (w_q - quant(w_q)) / U_qq`: `W[:, j] -= err * U_qj` for all `j > q`.
Inside a block of columns that is done at once, and for the columns behind the block once per block, as one matmul
(step 2, "lazy batch updates").

Weights are held transposed, `(K, N)`: a column of W is then contiguous. Codes that stand for several neighbours
along K (`element.vector`) choose all of them before any error is passed on; a *unit* is what one code stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lowbit.errors import see
from lowbit.formats import Format, Planes
from lowbit.formats.base import count_nonfinite

#: How often the dampening may grow tenfold before a Hessian is refused.
RETRIES = 3


def gptq(
    w: Tensor,
    hessian: Tensor,
    fmt: Format,
    params: Planes | None = None,
    *,
    damp: float = 0.01,
    block: int = 128,
    act_order: bool = False,
) -> Planes:
    """All planes of `w (N, K)` in `fmt`, chosen for a small error of the layer's output.

    Without `params`, the scales of a group are chosen when its first column is reached, from the weights as they have
    become by then. Where that is not possible, because a plane belongs to the whole tensor or to whole rows, and with
    `act_order`, all are chosen beforehand from `w`.

    A column that met no input (`H_kk = 0`) is rounded to nearest: whatever it holds costs nothing here, and may matter
    for other inputs.

    Args:
        w: 2-D, any float dtype, finite.
        hessian: `(K, K)`, `X^T X` of the layer's inputs or any positive multiple of it.
        params: the scale planes to use.
        damp: this share of the mean of H's diagonal is added to the diagonal. It grows tenfold, at most `RETRIES`
            times, while the sum cannot be factored in fp64.
        block: columns between two updates of all that follow; the result differs only by rounding in fp32.
        act_order: visit columns in descending order of `H_kk`. Nothing has to be stored for it.

    Returns:
        What `fmt.quantize(w)` returns: every plane by name.

    Raises:
        ValueError: an argument has a wrong shape, a value that is not finite or out of range; all inputs were zero;
            H stays without an inverse.
    """
    _check(w, hessian, fmt, params, damp, block)
    if w.numel() == 0:
        return fmt.quantize(w, params)
    hessian = hessian.detach().to(w.device, torch.float32)
    dead, w = hessian.diagonal() == 0, w.detach()

    (n, k), v = w.shape, fmt.element.vector
    units = -(-k // v)
    order = torch.arange(units, device=w.device)
    wt = torch.nn.functional.pad(w.float(), (0, units * v - k)).T.contiguous()
    if act_order:
        importance = torch.nn.functional.pad(hessian.diagonal(), (0, units * v - k)).view(units, v).sum(1)
        order = importance.argsort(descending=True, stable=True)
        wt = wt.view(units, v, n)[order].view(units * v, n)
    upper = _inverse_factor(hessian, dead, damp, order, v)

    group = None if params is not None or act_order else _group(fmt)
    if group is not None:
        params = {p.name: torch.empty(p.shape_for(n, k), dtype=p.dtype, device=w.device) for p in fmt.scale_planes}
    elif params is None:
        params = fmt.choose_params(w)

    codes = torch.empty(units, n, dtype=torch.uint8, device=w.device)
    visited = order.tolist()
    for start, stop in _blocks(units * v, block, group or v, v):
        errors = torch.empty(stop - start, n, dtype=torch.float32, device=w.device)
        for i in range(start, stop, v):
            if group is not None and i % group == 0:
                end = min(i + group, k)
                held = fmt.slice_planes(params, 1, i, end)
                for name, chosen in fmt.choose_params(wt[i:end].T).items():
                    held[name].copy_(chosen)
            unit = visited[i // v]
            scales = fmt.slice_planes(params, 1, unit * v, unit * v + v)
            code = fmt.encode(wt[i : i + v].T, scales)
            rounded = fmt.scaled(fmt.levels(code, scales, v), scales)
            codes[unit] = code[:, 0]
            for j in range(i, i + v):
                error = (wt[j] - rounded[:, j - i]) / upper[j, j]
                wt[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
                errors[j - start] = error
        wt[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return fmt.element.pack(codes.T.contiguous()) | {p.name: params[p.name] for p in fmt.scale_planes}


def output_error(w: Tensor, planes: Mapping[str, Tensor], hessian: Tensor, fmt: Format) -> float:
    """`tr(E H E^T)` of `E = w - what the planes stand for`: equation 1, what `gptq` makes small."""
    error = w.detach().float() - fmt.dequantize(planes, *w.shape)
    return float((error @ hessian.to(error.device, torch.float32)).mul_(error).sum(dtype=torch.float64))


def _group(fmt: Format) -> int | None:
    """Columns after which every scale plane begins anew, or None where some plane spans all of them.

    Planes that scale other scales, or belong to the whole tensor, are chosen from all weights.
    """
    planes = fmt.scale_planes
    if any(p.shape is not None or p.k is None or p.name in ("outer_scale", "scale_offset") for p in planes):
        return None
    return math.lcm(fmt.element.vector, *(p.k for p in planes if p.k is not None))


def _blocks(k: int, block: int, group: int, vector: int) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive columns, at most `block` of them but at least a unit. A group lies inside one block or
    begins with one, so that all of its weights are up to date when its first column is reached."""
    block = max(vector, block - block % vector)
    span = group * max(1, block // group)
    for outer in range(0, k, span):
        end = min(outer + span, k)
        for start in range(outer, end, block):
            yield start, min(start + block, end)


def _inverse_factor(hessian: Tensor, dead: Tensor, damp: float, order: Tensor, vector: int) -> Tensor:
    """fp32 upper triangular U with `U^T U = (H + damp * mean(diag H))^-1`, columns in the order of the units.

    H is divided by that mean first, so that its unit does not matter. Dead columns, and those that fill the last unit,
    get a one on the diagonal: they neither cause nor take a correction.
    """
    k, size = hessian.shape[0], order.numel() * vector
    alive = hessian.diagonal()[~dead]
    h = hessian / alive.double().mean().float()
    h = torch.nn.functional.pad(h, (0, size - k, 0, size - k))
    # H = R R^T with R upper is the Cholesky factorization of H read backwards, and U is R^-1.
    columns = (order[:, None] * vector + torch.arange(vector, device=h.device)).flatten().flip(0)
    h = h[columns][:, columns]
    h.diagonal()[h.diagonal() == 0] = 1
    for dtype, growth in ((torch.float32, 1), *((torch.float64, 10**i) for i in range(RETRIES + 1))):
        damped = h.to(dtype, copy=True)
        damped.diagonal().add_(damp * growth)
        lower, info = torch.linalg.cholesky_ex(damped)
        # A pivot that rounding alone could have left is none: the columns before determine this one.
        smallest = damped.diagonal() * (size * torch.finfo(dtype).eps)
        if bool((info == 0) & (lower.diagonal().square() > smallest).all()):
            identity = torch.eye(size, dtype=dtype, device=h.device)
            inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
            return inverse.float().flip(0, 1)
    raise ValueError(
        f"gptq: H ({k}, {k}) has no inverse, not even with {damp * growth:g} times the mean of its diagonal added; it "
        "must be X^T X, which has no negative eigenvalues. Sum it in fp32, or pass a larger damp (usual: 0.01)"
        + see("bad-option")
    )


def _check(w: Tensor, hessian: Tensor, fmt: Format, params: Planes | None, damp: float, block: int) -> None:
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(
            f"gptq: takes a 2-D float weight (N, K), got {w.dtype} of shape {tuple(w.shape)}; flatten what is behind N"
            + see("input-mismatch")
        )
    n, k = w.shape
    if tuple(hessian.shape) != (k, k) or not hessian.is_floating_point():
        raise ValueError(
            f"gptq: the Hessian of a weight ({n}, {k}) is a float tensor ({k}, {k}), X^T X of its inputs (M, {k}); got "
            f"{hessian.dtype} of shape {tuple(hessian.shape)}" + see("input-mismatch")
        )
    if not (math.isfinite(damp) and damp >= 0 and block >= 1):
        raise ValueError(
            f"gptq: damp must be a finite number from 0 (usual: 0.01) and block at least 1, got damp={damp}, "
            f"block={block}" + see("bad-option")
        )
    if params is not None:
        wanted = {p.name: (p.dtype, p.shape_for(n, k)) for p in fmt.scale_planes}
        got = {name: (t.dtype, tuple(t.shape)) for name, t in params.items()}
        if got != wanted:
            raise ValueError(
                f"gptq: the scale planes of {fmt.spec} for a weight ({n}, {k}) are {wanted}, got {got}; "
                "fmt.choose_params(w) gives such planes" + see("bad-option")
            )
    if bad := count_nonfinite(w):
        raise ValueError(f"gptq: the weight holds {bad} NaN or Inf values; repair them" + see("nonfinite-weight"))
    if bad := count_nonfinite(hessian):
        raise ValueError(
            f"gptq: the Hessian holds {bad} NaN or Inf values; look for the first layer whose output overflows"
            + see("calibration-saw-nothing")
        )
    diagonal = hessian.diagonal()
    if bool((diagonal < 0).any()):
        raise ValueError(
            f"gptq: the diagonal of the Hessian X^T X is a sum of squares, got {float(diagonal.amin()):g} at "
            f"{int(diagonal.argmin())}; pass X^T X or a positive multiple" + see("bad-option")
        )
    if w.numel() and not bool(diagonal.any()):
        raise ValueError(
            "gptq: the Hessian is zero, so that all inputs were; pass typical inputs, or use fmt.quantize(w)"
            + see("calibration-saw-nothing")
        )
