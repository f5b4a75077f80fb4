"""The CUDA C++ kernel for Hopper's matrix units: right for every format and tile, and the same bits every time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import sqnr_db
from gpu_cases import assert_close, expected, inputs, weight_on_gpu

import lowbit
from lowbit.formats import Format, registered
from lowbit.kernels.cuda import decode, wgmma
from lowbit.kernels.cuda.wgmma import Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

FORMATS = [f for f in registered() if not isinstance(decode.constants(f), str)]
CONFIGS = [
    Config(16, blocks=2), Config(16, 2, cut=True), Config(16, cut=True, blocks=2), Config(32, blocks=2),
    Config(32, cut=True, blocks=2), Config(64, 2), Config(64, cut=True), Config(128, cut=True), Config(128, 2),
    Config(128, 2, cut=True), Config(256), Config(256, cut=True), Config(16, cut=True, warpgroups=4),
    Config(16, blocks=2, split=2), Config(64, 2, split=4), Config(64, split=4), Config(128, split=4),
    Config(256, split=2), Config(16, blocks=2, own_order=True), Config(32, cut=True, blocks=2, own_order=True),
    Config(64, 2, own_order=True), Config(64, split=4, own_order=True), Config(128, own_order=True),
    Config(128, 2, own_order=True), Config(256, cut=True, own_order=True), Config(128, split=4, own_order=True),
    Config(256, split=2, own_order=True), Config(64, cut=True, warpgroups=3), Config(128, split=4, warpgroups=3),
    Config(128, warpgroups=3, own_order=True), Config(64, split=2, warpgroups=3, own_order=True),
    Config(256, cluster=2), Config(256, cluster=2, own_order=True), Config(256, cut=True, cluster=2, own_order=True),
    Config(256, split=2, cluster=2, own_order=True), Config(128, 2, cut=True, cluster=2),
    Config(16, blocks=2, cluster=2),
]  # fmt: skip


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (100, 1152), (770, 2048)], ids=str)
def test_matches_fp64(fmt: Format, n: int, k: int) -> None:
    for m in (1, 17, 64, 129, 300):
        dtype = torch.float16 if m == 17 else torch.bfloat16
        x = inputs(m, k, dtype, seed=m)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(m)).to(dtype).cuda() if m % 2 else None
        y = wgmma.launch(x, weight_on_gpu(fmt, n, k).planes, fmt, n, bias)
        assert_close(y, expected(x, weight_on_gpu(fmt, n, k), bias), fmt, dtype)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "spec",
    ["int4:g128", "int8:row", "int8:g32:asym", "mxfp8_e4m3", "float8_e5m2:row", "mxfp4", "nf4:g64", "int1:g128",
     "int3:g64", "codebook4v2:g64"],
)  # fmt: skip
def test_every_tile(config: Config, spec: str) -> None:
    fmt = next(f for f in FORMATS if f.spec == spec)
    if isinstance(wgmma.constants(fmt, config), str):
        pytest.skip("there is no such instance: its sums do not fit the registers")
    k = 3200
    for n, m in ((388, 5), (392, 130), (392, 600)):  # rows of outputs that the copy engine can write, or not
        x = inputs(m, k, torch.bfloat16, seed=m)
        y = wgmma.launch(x, weight_on_gpu(fmt, n, k).planes, fmt, n, config=config)
        assert_close(y, expected(x, weight_on_gpu(fmt, n, k)), fmt, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_common_inputs_lose_little(fmt: Format, dtype: torch.dtype) -> None:
    """Errors of many products average out: what is left is the rounding of the output (55.6 dB) and of the weights."""
    x = torch.randn(128, 2048, generator=torch.Generator().manual_seed(0)).to(dtype).cuda()
    w = weight_on_gpu(fmt, 256, 2048)
    # The last row of the weight is 50 times the others and would decide alone.
    y, reference = wgmma.launch(x, w.planes, fmt, 256)[:, :-1], expected(x, w)[:, :-1]
    least = 66 if dtype == torch.float16 else 50 if fmt.kernel_sqnr_db < 46 else 52
    assert sqnr_db(reference, y) > least


def test_row_does_not_depend_on_its_company_where_tiles_are_whole() -> None:
    fmt, n, k = FORMATS[0], 256, 1024
    x, w = inputs(256, k, torch.bfloat16), weight_on_gpu(FORMATS[0], 256, 1024)
    whole = wgmma.launch(x, w.planes, fmt, n, config=Config(128))
    for m, config in ((1, Config(16, blocks=2)), (33, Config(64)), (100, Config(128, 2)), (256, Config(256))):
        assert torch.equal(wgmma.launch(x[:m].contiguous(), w.planes, fmt, n, config=config), whole[:m])


@pytest.mark.parametrize("spec", ["int4:g128", "int8:row", "nf4:g64", "int3:g64", "mxfp4"])
@pytest.mark.parametrize("n", [64, 388, 1024])
def test_clusters_give_the_same_bits(spec: str, n: int) -> None:
    """The last cluster may have blocks without any rows."""
    fmt = next(f for f in FORMATS if f.spec == spec)
    x, w = inputs(700, 2048, torch.bfloat16), weight_on_gpu(fmt, n, 2048)
    for own_order in (False, True):
        config = Config(256, own_order=own_order)
        if isinstance(wgmma.constants(fmt, config), str):
            continue
        alone = wgmma.launch(x, w.planes, fmt, n, config=config)
        for _ in range(5):
            together = wgmma.launch(x, w.planes, fmt, n, config=replace(config, cluster=2))
            assert torch.equal(alone, together)


@pytest.mark.parametrize("cut", [False, True])
def test_bits_repeat(cut: bool) -> None:
    fmt = next(f for f in FORMATS if f.spec == "int4:g128")
    x, w = inputs(100, 4096, torch.bfloat16), weight_on_gpu(fmt, 1024, 4096)
    first = wgmma.launch(x, w.planes, fmt, 1024, config=Config(128, cut=cut))
    for _ in range(50):
        assert torch.equal(wgmma.launch(x, w.planes, fmt, 1024, config=Config(128, cut=cut)), first)


def test_more_blocks_than_activations() -> None:
    """Every shared tile has a flag, also where the kernel that clears them has little else to do."""
    fmt, n, k = next(f for f in FORMATS if f.spec == "int4:g128"), 20_000, 256
    w, x = weight_on_gpu(fmt, n, k), inputs(3, k, torch.bfloat16)
    for _ in range(20):
        y = wgmma.launch(x, w.planes, fmt, n, config=Config(16, cut=True, blocks=2))
    assert_close(y, expected(x, w), fmt, torch.bfloat16)


def test_two_streams_at_once() -> None:
    """Blocks that share tiles have sums and flags of their own for every launch."""
    fmt, n, k = next(f for f in FORMATS if f.spec == "int4:g128"), 4096, 4096
    w, config = weight_on_gpu(fmt, n, k), Config(64, cut=True)
    xs = [inputs(64, k, torch.bfloat16, seed) for seed in range(2)]
    references = [wgmma.launch(x, w.planes, fmt, n, config=config) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for x, stream in zip(xs, streams):
            with torch.cuda.stream(stream):
                results.append(wgmma.launch(x, w.planes, fmt, n, config=config))
    torch.cuda.synchronize()
    assert all(torch.equal(y, references[i % 2]) for i, y in enumerate(results))


@pytest.mark.parametrize("spec", ["int4:g128", "int8:row", "nf4:g64", "mxfp4", "float8_e4m3:row", "int3:g64"])
def test_batch_invariance(spec: str) -> None:
    """Row i has the same bits for every number of tokens, through the layer itself."""
    fmt = next(f for f in FORMATS if f.spec == spec)
    x, w = inputs(512, 2048, torch.bfloat16), weight_on_gpu(fmt, 520, 2048)
    with lowbit.batch_invariant():
        whole = F.linear(x, w)
        for m in (1, 2, 7, 8, 9, 16, 33, 64, 65, 128, 300, 511):
            assert torch.equal(F.linear(x[:m], w), whole[:m]), m
            assert torch.equal(F.linear(x[-m:], w), whole[-m:]), m
