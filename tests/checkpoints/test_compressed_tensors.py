"""The compressed-tensors convention: names, dtypes, shapes and bits, spelled out and unpacked again in NumPy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import weights
from safetensors.torch import save_file
from torch import nn

from lowbit import QuantizedTensor, calibrate, parse_format, quantize_
from lowbit.checkpoint import CheckpointError, load, read, save, verify
from lowbit.checkpoints import compressed_tensors as ct
from lowbit.checkpoints.manifest import StoredWeight
from lowbit.formats import registered
from lowbit.formats.activation import parse_activation

N, K = 27, 256
INT = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
FLOAT = INT | {"type": "float"}
TOKEN = {"strategy": "token", "dynamic": True}
NVFP4 = {
    "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16, "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
}  # fmt: skip
MXFP4 = NVFP4 | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
MXFP8 = MXFP4 | {"num_bits": 8}


def group(size: int) -> dict[str, Any]:
    return {"strategy": "group", "group_size": size}


def int4(size: int, symmetric: bool = True) -> dict[str, Any]:
    return INT | {"num_bits": 4, "symmetric": symmetric} | group(size)


PACKED8 = {"weight_packed": ("I32", [27, 64]), "weight_shape": ("I64", [2])}
PACKED4 = {"weight_packed": ("I32", [27, 32]), "weight_shape": ("I64", [2])}
CODES8 = {"weight": ("F8_E4M3", [27, 256])}
NVFP4_TENSORS = {
    "weight_packed": ("U8", [27, 128]), "weight_scale": ("F8_E4M3", [27, 16]), "weight_global_scale": ("F32", [1]),
}  # fmt: skip
MXFP4_TENSORS = {"weight_packed": ("U8", [27, 128]), "weight_scale": ("U8", [27, 8])}
MXFP8_TENSORS = CODES8 | {"weight_scale": ("U8", [27, 8])}
ROW = {"weight_scale": ("F32", [27, 1])}
ONE = {"weight_scale": ("F32", [1])}
BLOCKS = {"weight_scale": ("F32", [1, 2])}
BLOCK = {"strategy": "block", "block_structure": [128, 128]}

# config: (format, weights, input_activations, tensors of a layer (27, 256))
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "int8wo": ("pack-quantized", INT, None, PACKED8 | ROW),
    "int8wo-128": ("pack-quantized", INT | group(128), None, PACKED8 | {"weight_scale": ("BF16", [27, 2])}),
    "int4wo-128-sym": ("pack-quantized", int4(128), None, PACKED4 | {"weight_scale": ("BF16", [27, 2])}),
    "int4:g32:fp16": ("pack-quantized", int4(32), None, PACKED4 | {"weight_scale": ("F16", [27, 8])}),
    "int4wo-64": (
        "pack-quantized", int4(64, False), None,
        PACKED4 | {"weight_scale": ("BF16", [27, 4]), "weight_zero_point": ("I32", [4, 4])},
    ),
    "int8:g64:asym": (
        "pack-quantized", INT | {"symmetric": False} | group(64), None,
        PACKED8 | {"weight_scale": ("BF16", [27, 4]), "weight_zero_point": ("I32", [7, 4])},
    ),
    "int8dq": ("int-quantized", INT, INT | TOKEN, {"weight": ("I8", [27, 256])} | ROW),
    "int8dq-asym": ("int-quantized", INT, INT | TOKEN | {"symmetric": False}, {"weight": ("I8", [27, 256])} | ROW),
    "int8sq": (
        "int-quantized", INT, INT | {"strategy": "tensor"},
        {"weight": ("I8", [27, 256]), "input_scale": ("F32", [1])} | ROW,
    ),
    "float8dq-row": ("float-quantized", FLOAT, FLOAT | TOKEN, CODES8 | ROW),
    "float8dq": (
        "float-quantized", FLOAT | {"strategy": "tensor"}, FLOAT | {"strategy": "tensor", "dynamic": True},
        CODES8 | ONE,
    ),
    "float8dq-block": (
        "float-quantized", FLOAT | BLOCK, FLOAT | group(128) | {"dynamic": True}, CODES8 | BLOCKS,
    ),
    "float8sq": (
        "float-quantized", FLOAT | {"strategy": "tensor"}, FLOAT | {"strategy": "tensor"},
        CODES8 | ONE | {"input_scale": ("F32", [1])},
    ),
    "float8wo": ("float-quantized", FLOAT, None, CODES8 | ROW),
    "float8wo-tensor": ("float-quantized", FLOAT | {"strategy": "tensor"}, None, CODES8 | ONE),
    "float8wo-block": ("float-quantized", FLOAT | BLOCK, None, CODES8 | BLOCKS),
    "nvfp4wo": ("nvfp4-pack-quantized", NVFP4, None, NVFP4_TENSORS),
    "nvfp4sq": (
        "nvfp4-pack-quantized", NVFP4, NVFP4 | {"dynamic": "local"},
        NVFP4_TENSORS | {"input_global_scale": ("F32", [1])},
    ),
    "mxfp4wo": ("mxfp4-pack-quantized", MXFP4, None, MXFP4_TENSORS),
    "mxfp4dq": ("mxfp4-pack-quantized", MXFP4, MXFP4 | {"dynamic": True}, MXFP4_TENSORS),
    "mxfp8dq": ("mxfp8-quantized", MXFP8, MXFP8 | {"dynamic": True}, MXFP8_TENSORS),
}  # fmt: skip
OTHERS = [
    "int8:tensor", "int8:b128x128", "int4:tensor", "int3wo-64", "int8dq-tensor", "int8dq-int4-32", "float8dq-int4-128",
    "float8wo-128", "float8wo-e5m2", "float8wo-b64x64", "mxfp6wo", "mxfp8e5m2wo", "mxfp8_e4m3->mxfp4", "nvfp4dq",
    "nf4wo-64", "codebook4wo-64", "int4wo-512", "int8:row->float8_e4m3:row",
]  # fmt: skip


def model() -> nn.Module:
    out = nn.Module()
    out.block = nn.ModuleDict({"up": nn.Linear(K, N), "down": nn.Linear(K, N, bias=False)})
    out.lm_head = nn.Linear(K, 8)
    for i, name in enumerate(("up", "down")):
        out.block[name].weight.data = weights("outlier_channels", N, K, i)  # type: ignore[index,union-attr]
    return out.bfloat16()


def quantized(spec: str) -> nn.Module:
    out = model()
    layers = nn.Sequential(nn.Linear(K, 1))
    statistics = calibrate(layers, [torch.randn(5, K, generator=torch.Generator().manual_seed(1))])["0"]
    names = ("block.up", "block.down")
    if "b64x64" in spec:
        spec = "float8_e4m3:b64x64"
    quantize_(out, dict.fromkeys(names, spec), calibration=dict.fromkeys(names, statistics), measure=False)
    return out


# Reading the bytes without lowbit and without safetensors -------------------------------------------------------------

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def e4m3(code: np.ndarray) -> np.ndarray:
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, (code & 7).astype(np.float32)
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7))
    return np.where(sign == 1, -value, value).astype(np.float32)


def arrays(path: Path) -> dict[str, tuple[str, list[int], np.ndarray]]:
    """Tensors of a safetensors file: dtype name, shape, and the numbers they stand for (codes of less as bytes)."""
    raw = path.read_bytes()
    data = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:data])
    assert header.pop("__metadata__") == {"format": "pt", "lowbit.format": "1"}
    out = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        piece = np.frombuffer(raw[data + start : data + end], np.uint8)
        kinds = {"I32": np.uint32, "I64": np.int64, "F32": np.float32, "F16": np.float16, "I8": np.int8}
        if entry["dtype"] == "BF16":
            piece = (piece.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] == "F8_E4M3":
            piece = e4m3(piece)
        elif entry["dtype"] in kinds:
            piece = piece.view(kinds[entry["dtype"]])
        out[name] = (entry["dtype"], entry["shape"], piece.reshape(entry["shape"]))
    return out


def unpack_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`count` unsigned codes of each row of 32-bit words, least significant first."""
    j = np.arange(count) * bits
    return ((words[:, j // 32] >> (j % 32).astype(np.uint32)) & ((1 << bits) - 1)).astype(np.int64)


def spread(scale: np.ndarray, n: int, k: int, weight_args: dict[str, Any]) -> np.ndarray:
    """One scale per weight."""
    if weight_args["strategy"] == "tensor":
        return np.full((n, k), scale[0])
    rows, columns = weight_args.get("block_structure") or (1, weight_args.get("group_size") or k)
    return scale.repeat(rows, 0)[:n].repeat(columns, 1)[:, :k]


def decode(t: dict[str, np.ndarray], weight_args: dict[str, Any], form: str) -> np.ndarray:
    """The weights in fp32 that the tensors of one layer stand for."""
    bits, scale = weight_args["num_bits"], t["weight_scale"].astype(np.float32)
    if form == "pack-quantized":
        n, k = (int(size) for size in t["weight_shape"])
        codes = unpack_words(t["weight_packed"], bits, k) - 2 ** (bits - 1)
        if not weight_args["symmetric"]:
            zero = unpack_words(t["weight_zero_point"].T, bits, n).T - 2 ** (bits - 1)
            codes = codes - spread(zero, n, k, weight_args)
        return codes.astype(np.float32) * spread(scale, n, k, weight_args)
    if form in ("int-quantized", "float-quantized", "mxfp8-quantized"):
        scale = 2.0 ** (scale - 127) if form.startswith("mx") else scale
        return t["weight"].astype(np.float32) * spread(scale, *t["weight"].shape, weight_args).astype(np.float32)
    packed = t["weight_packed"]
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)
    values = E2M1[codes & 7] * np.where(codes >> 3, -1, 1)
    scale = scale / t["weight_global_scale"] if form.startswith("nv") else 2.0 ** (scale - 127)
    return (values * spread(scale, *values.shape, weight_args)).astype(np.float32)


@pytest.mark.parametrize("spec", CASES)
def test_names_dtypes_shapes_and_bits(spec: str, tmp_path: Path) -> None:
    form, weight_args, _, tensors = CASES[spec]
    source = quantized(spec)
    save(source, tmp_path)
    stored = arrays(tmp_path / "model.safetensors")
    expected = {f"block.{layer}.{name}": info for layer in ("up", "down") for name, info in tensors.items()}
    plain = {"block.up.bias": ("BF16", [27]), "lm_head.weight": ("BF16", [8, 256]), "lm_head.bias": ("BF16", [8])}
    assert {name: (dtype, shape) for name, (dtype, shape, _) in stored.items()} == expected | plain
    for layer in ("up", "down"):
        own = {name.split(".")[-1]: value for name, (_, _, value) in stored.items() if f".{layer}." in name}
        got = decode(own, weight_args, form)
        w = source.get_submodule(f"block.{layer}").weight
        exact = w.dequantize(torch.float32).numpy()  # type: ignore[operator,union-attr]
        if "nvfp4" in spec:  # divided by the stored inverse of the global scale instead of multiplied
            np.testing.assert_allclose(got, exact, rtol=3e-7)
        else:
            np.testing.assert_array_equal(got, exact)
        if w.act_scale is not None:  # type: ignore[union-attr]
            scale = own["input_scale"] if "input_scale" in own else 1 / own["input_global_scale"]
            np.testing.assert_allclose(scale, w.act_scale.numpy()[0], rtol=1e-7)  # type: ignore[union-attr]


@pytest.mark.parametrize("spec", CASES)
def test_the_config_section(spec: str, tmp_path: Path) -> None:
    form, weight_args, act_args, _ = CASES[spec]
    save(quantized(spec), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weight_args,
                    "input_activations": act_args,
                    "output_activations": None,
                    "format": form,
                }
            },
        }
    }


@pytest.mark.parametrize("spec", OTHERS)
def test_what_the_convention_cannot_say_is_our_own(spec: str, tmp_path: Path) -> None:
    save(quantized(spec), tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "lowbit"


def test_partial_groups_and_embeddings_are_our_own(tmp_path: Path) -> None:
    for k, method in ((K, "compressed-tensors"), (K - 16, "lowbit")):
        layer = nn.ModuleDict({"a": nn.Linear(k, 8)})
        quantize_(layer, "int4wo-32-sym", measure=False)
        save(layer, tmp_path / str(k))
        assert (
            json.loads((tmp_path / str(k) / "config.json").read_text())["quantization_config"]["quant_method"] == method
        )


def test_one_group_per_scheme(tmp_path: Path) -> None:
    out = model()
    quantize_(out, {"block.up": "int4wo-128", "block.down": "float8dq-row"}, measure=False)
    save(out, tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert section["format"] == "mixed-precision"
    found = {name: (g["targets"], g["format"]) for name, g in section["config_groups"].items()}
    assert found == {
        "group_0": (["block.up"], "pack-quantized"),
        "group_1": (["block.down"], "float-quantized"),
    }


def test_the_class_is_not_named_where_experts_stay_float(tmp_path: Path) -> None:
    """Readers hold experts as linear layers, so `Linear` would say that they are quantized."""
    experts = model()
    experts.register_module("experts", nn.Module())
    experts.experts.register_parameter("gate_up_proj", nn.Parameter(torch.zeros(4, 16, 8)))  # type: ignore[union-attr,operator]
    found = {}
    for name, module in (("plain", model()), ("experts", experts)):
        quantize_(module, {"lm_head": None, "_default": "int8wo"}, measure=False)
        save(module, tmp_path / name)
        section = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        found[name] = section["config_groups"]["group_0"]["targets"]
    assert found == {"plain": ["Linear"], "experts": ["block.up", "block.down"]}


def test_describe_and_resolve_are_inverse() -> None:
    acts = [
        "", "int8:row", "int8:row:asym", "int8:tensor@static", "int8:tensor", "float8_e4m3:row", "float8_e4m3:tensor",
        "float8_e4m3:tensor@static", "float8_e4m3:g128", "float8_e5m2:row", "nvfp4@static", "nvfp4", "mxfp4",
        "mxfp8_e4m3", "mxfp6_e2m3",
    ]  # fmt: skip
    formats = [*registered(), *(parse_format(s) for s in ("int4:g32:asym", "int8:g48", "int4:g512"))]
    known = 0
    for weight in formats:
        for act in map(parse_activation, acts):
            described = ct.describe(weight, act)
            if described is None:
                continue
            known += 1
            back = ct.resolve(described)
            assert back is not None
            assert ct.describe(*back) == described
            assert back[0].element == weight.element
            assert [p.tile for p in back[0].planes] == [p.tile for p in weight.planes]
            assert (back[1].spec if back[1] else "") == (act.spec if act else "")
    assert known >= 25


# Other tools' directories ---------------------------------------------------------------------------------------------

# Arguments with everything that writers add.
NOISE = {
    "actorder": None, "block_structure": None, "group_size": None, "observer": "minmax", "observer_kwargs": {},
    "zp_dtype": None, "scale_dtype": None,
}  # fmt: skip


def write(directory: Path, tensors: dict[str, torch.Tensor], groups: Any, form: str, **section: Any) -> None:
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "model_type": "net",
        "torch_dtype": "float16",
        "quantization_config": {
            "config_groups": groups, "format": form, "global_compression_ratio": None, "ignore": ["re:.*head"],
            "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed",
            "sparsity_config": {}, "transform_config": {}, "version": "0.12.2",
        } | section,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))


def one_group(weight_args: Any, acts: Any = None, **more: Any) -> Any:
    entry = {
        "targets": ["Linear"],
        "weights": NOISE | weight_args,
        "input_activations": acts,
        "output_activations": None,
    }
    return {"group_0": entry | more}


def test_float8_of_another_tool(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0  # NaN
    codes = codes.repeat(4, 1)[:, :160].contiguous().view(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5], [0.001], [3.0], [1.0]], dtype=torch.bfloat16)
    tensors = {"a.weight": codes, "a.weight_scale": scale, "head.weight": torch.ones(2, 3, dtype=torch.float16)}
    write(tmp_path, tensors, one_group(FLOAT, NOISE | FLOAT | TOKEN), "float-quantized")
    assert verify(tmp_path).ok
    assert not verify(tmp_path).manifest
    with torch.device("meta"):
        target = nn.ModuleDict({"a": nn.Linear(160, 4, bias=False), "head": nn.Linear(3, 2, bias=False)})
    w = load(target, tmp_path).get_submodule("a").weight
    assert isinstance(w, QuantizedTensor)
    assert (w.format.spec, w.act_spec, w.dtype) == ("float8_e4m3:row", "float8_e4m3:row", torch.float16)
    assert w.scale.dtype == torch.float32
    assert torch.equal(w.dequantize(torch.float32), codes.float() * scale.float())


def test_int4_of_another_tool(tmp_path: Path) -> None:
    n, k, size = 5, 24, 8
    generator = np.random.default_rng(0)
    codes, zero = generator.integers(0, 16, (n, k)), generator.integers(0, 16, (n, k // size))
    scale = torch.rand(n, k // size, generator=torch.Generator().manual_seed(0)).half()

    def pack(values: np.ndarray) -> torch.Tensor:
        words = np.zeros((values.shape[0], -(-values.shape[1] // 8)), np.uint32)
        for j in range(values.shape[1]):
            words[:, j // 8] |= values[:, j].astype(np.uint32) << np.uint32(4 * (j % 8))
        return torch.from_numpy(words.view(np.int32))

    tensors = {
        "m.0.up.weight_packed": pack(codes),
        "m.0.up.weight_scale": scale,
        "m.0.up.weight_shape": torch.tensor([n, k]),
        "m.0.up.weight_zero_point": pack(zero.T).t().contiguous(),
        "m.0.up.bias": torch.zeros(n),
    }
    arguments = one_group(int4(size, False), targets=["re:.*up$"])
    write(tmp_path, tensors, arguments, "pack-quantized")
    w = read(tmp_path)["m.0.up.weight"]
    assert isinstance(w, QuantizedTensor)
    assert w.format.spec == "int4:g8:asym:fp16"
    expected = (codes - zero.repeat(size, 1)) * scale.float().numpy().repeat(size, 1)
    assert torch.equal(w.dequantize(torch.float32), torch.from_numpy(expected).float())


def test_fp4_of_another_tool(tmp_path: Path) -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    tensors = {
        "nv.weight_packed": packed, "nv.weight_scale": torch.full((4, 8), 1.75).to(torch.float8_e4m3fn),
        "nv.weight_global_scale": torch.tensor([640.0]), "nv.input_global_scale": torch.tensor([32.0]),
        "mx.weight_packed": packed.clone(),
        "mx.weight_scale": torch.tensor([[127, 120, 130, 0]] * 4, dtype=torch.uint8),
    }  # fmt: skip
    groups = {
        "group_0": one_group(NVFP4, NVFP4 | {"dynamic": "local"}, targets=["nv"], format="nvfp4-pack-quantized")[
            "group_0"
        ],
        "group_1": one_group(MXFP4, targets=["Linear"], format="mxfp4-pack-quantized")["group_0"],
    }
    write(tmp_path, tensors, groups, "mixed-precision")
    state = read(tmp_path)
    low, high = packed & 15, packed >> 4
    codes = torch.stack([low, high], -1).reshape(4, -1).int()
    values = torch.from_numpy(E2M1)[codes & 7] * torch.where(codes >= 8, -1, 1)
    nv, mx = state["nv.weight"], state["mx.weight"]
    assert isinstance(nv, QuantizedTensor)
    assert isinstance(mx, QuantizedTensor)
    assert torch.equal(nv.dequantize(torch.float32), values * (1.75 * torch.tensor(640.0).reciprocal()))
    assert (nv.act_spec, nv.act_scale.item()) == ("nvfp4@static", 1 / 32)  # type: ignore[union-attr]
    scale = 2.0 ** (torch.tensor([127, 120, 130, 0]) - 127.0)
    assert torch.equal(mx.dequantize(torch.float32), values * scale.repeat_interleave(32))


INT8 = {"a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1)}


@pytest.mark.parametrize(
    ("arguments", "section", "expected"),
    [
        (INT | {"num_bits": 3}, {}, "'num_bits': 3"),
        (INT | {"num_bits": 8, "secret": 1}, {}, "unknown arguments ['secret']"),
        (INT | {"actorder": "group"}, {}, "actorder 'group'"),
        (INT | {"strategy": "tensor"}, {}, "'strategy': 'tensor'"),
        (INT | {"strategy": None}, {}, "no strategy"),
        (INT | {"group_size": "64"}, {}, "group_size must be a positive number, found '64'"),
        (INT | {"group_size": 0}, {}, "group_size"),
        (FLOAT, {}, "lowbit does not read format 'int-quantized'"),
        (INT, {"format": "marlin-24"}, "marlin-24"),
        (INT, {"format": None}, "format None"),
        (INT, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (INT, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (INT, {"quantization_status": "frozen"}, "quantization_status must be 'compressed', found 'frozen'"),
        (INT, {"surprise": 1}, "unknown keys ['surprise']"),
        (INT, {"ignore": "lm_head"}, "ignore must be a list"),
        (INT, {"ignore": ["re:("]}, "re:("),
        (INT, {"ignore": ["a"]}, "a has quantized tensors, but no group"),
        (INT, {"config_groups": {"W8A8": ["Linear"]}}, "config_groups.W8A8"),
        (INT, {"config_groups": []}, "config_groups must be an object"),
        (INT, {"config_groups": {}}, "a has quantized tensors, but no group"),
        (INT, {"config_groups": {"g": {"targets": ["Linear"]}}}, "config_groups.g: arguments must be an object"),
        (INT, {"config_groups": {"g": {"targets": [], "weights": INT}}}, "targets must be a list of names"),
        (INT, {"config_groups": {"g": {"targets": ["Linear"], "weights": INT, "x": 1}}}, "unknown keys ['x']"),
        (INT, {"config_groups": {"g": {"targets": ["a"], "weights": INT, "output_activations": INT}}}, "output_act"),
    ],
)
def test_unknown_words_are_named(arguments: Any, section: Any, expected: str, tmp_path: Path) -> None:
    write(tmp_path, INT8, one_group(arguments, INT | TOKEN), "int-quantized", **section)
    assert not verify(tmp_path).ok
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"a.weight": torch.zeros(4, 8, dtype=torch.uint8)}, "a.weight of a.weight (int8:row->int8:row) is U8 [4, 8]"),
        ({"a.weight": torch.zeros(4, 8, 1, dtype=torch.int8)}, "needs 2-D codes"),
        ({"a.weight": None}, "needs 2-D codes and weight_scale, found weight_scale"),
        ({"a.weight_scale": torch.ones(4)}, "weight_scale of a.weight (int8:row->int8:row) is F32 [4], expected"),
        ({"a.weight_scale": torch.ones(4, 1, dtype=torch.float64)}, "is F64 [4, 1], expected F32 [4, 1]"),
        ({"a.weight_zero_point": torch.zeros(4, 1)}, "a.weight_zero_point does not belong to int8:row"),
        ({"a.weight_g_idx": torch.zeros(8)}, "a.weight_g_idx does not belong"),
    ],
)
def test_tensors_that_do_not_fit(change: Any, expected: str, tmp_path: Path) -> None:
    tensors = {name: t for name, t in (INT8 | change).items() if t is not None}
    write(tmp_path, tensors, one_group(INT, INT | TOKEN), "int-quantized")
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        read(tmp_path)


def test_codes_without_scales_are_not_taken_for_weights(tmp_path: Path) -> None:
    write(tmp_path, {"a.weight": INT8["a.weight"]}, one_group(INT, INT | TOKEN), "int-quantized")
    with pytest.raises(CheckpointError, match="codes without their scales"):
        load(nn.ModuleDict({"a": nn.Linear(8, 4, bias=False)}), tmp_path)


def test_expressible_is_about_whole_groups() -> None:
    def stored(spec: str, *shape: int) -> StoredWeight:
        return StoredWeight(parse_format(spec), None, shape, torch.bfloat16)

    assert ct.expressible(stored("nvfp4", 3, 48))
    assert not ct.expressible(stored("nvfp4", 3, 40))
    assert ct.expressible(stored("float8_e4m3:b128x128", 130, 40))  # blocks at the edges are smaller
    assert ct.expressible(stored("int8:row", 1, 1))
    assert not ct.expressible(stored("int8:row", 4, 3, 2, 2))
