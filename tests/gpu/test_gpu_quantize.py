"""Quantizing on a GPU gives the codes and scales that quantizing on the CPU gives, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cases import KINDS, each_format, same_bits, weights

from lowbit.formats import Format


@each_format
@pytest.mark.parametrize("kind", KINDS)
def test_planes_equal_the_cpus(fmt: Format, kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        w = weights(kind, 140, 301).to(dtype)
        expected = fmt.quantize(w)
        params = {p.name: expected[p.name].cuda() for p in fmt.scale_planes}
        # A learned codebook is a sum over all weights, in another order on a GPU: it is given, the codes are compared.
        learned = fmt.has("codebook") and not torch.equal(
            expected["codebook"], fmt.quantize(weights("normal", 8, 64))["codebook"]
        )
        got = fmt.quantize(w.cuda(), params if learned else None)
        for name, plane in expected.items():
            differ = (got[name].cpu().view(torch.uint8) != plane.view(torch.uint8)).sum()
            assert same_bits(got[name].cpu(), plane), f"{name}: {differ} bytes of {plane.nbytes} differ"
        assert same_bits(fmt.dequantize(got, *w.shape).cpu(), fmt.dequantize(expected, *w.shape))
