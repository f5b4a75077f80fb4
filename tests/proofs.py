"""Which scheme is proven with which reader, and by which test: the tests take their cases from here, and
docs/compatibility.md its tables (docs_tables.py)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from lowbit import parse_config
from lowbit.checkpoints import compressed_tensors as ct
from lowbit.checkpoints.reading import READABLE

TESTS = Path(__file__).parent

#: Every scheme that compressed-tensors can express, as lowbit writes it.
WRITTEN = (
    "int8wo", "int8wo-128", "int4wo-128-sym", "int4wo-128", "int4wo-32", "int8:g64:asym", "int8dq", "int8dq-asym",
    "int8sq", "float8wo", "float8wo-tensor", "float8wo-block", "float8dq-row", "float8dq", "float8dq-block", "float8sq",
    "nvfp4wo", "nvfp4sq", "mxfp4wo", "mxfp4dq", "mxfp8wo", "mxfp8dq",
)  # fmt: skip
#: Where the plain call of transformers fails: it lays zero points out unpacked, and the package writes them packed.
REFUSED_BY_THE_PLAIN_CALL = ("int4wo-128", "int4wo-32", "int8:g64:asym")
#: Decoded to bf16 there, whatever the model is.
DECODED_TO_BF16 = ("nvfp4wo", "nvfp4sq", "mxfp4wo", "mxfp4dq", "mxfp8wo", "mxfp8dq")
_NONE = "NotImplementedError: No compressed-tensors compatible scheme"
#: The class by which the reader of compressed-tensors in vLLM and in SGLang runs a scheme, without "CompressedTensors";
#: of SGLang also why it does not, beginning with the error's name.
PICKED: dict[str, tuple[str, str]] = {
    "int8wo": ("WNA16", "ValueError: Downcasting not allowed"),
    **dict.fromkeys(("int8wo-128", "int4wo-128-sym", "int4wo-128", "int4wo-32", "int8:g64:asym"), ("WNA16", "WNA16")),
    **dict.fromkeys(("int8dq", "int8dq-asym"), ("W8A8Int8", "W8A8Int8")),
    "int8sq": ("W8A8Int8", "IndexError"),
    **dict.fromkeys(("float8wo", "float8wo-tensor"), ("W8A16Fp8", "W8A16Fp8")),
    "float8wo-block": ("W8A16Fp8", _NONE),
    **dict.fromkeys(("float8dq-row", "float8dq", "float8dq-block", "float8sq"), ("W8A8Fp8", "W8A8Fp8")),
    **dict.fromkeys(("nvfp4wo", "nvfp4sq"), ("W4A4Fp4", "W4A16Fp4")),
    **dict.fromkeys(("mxfp4wo", "mxfp4dq"), ("W4A4Mxfp4", _NONE)),
    **dict.fromkeys(("mxfp8wo", "mxfp8dq"), ("W8A8Mxfp8", _NONE)),
}
#: Schemes of the package compressed-tensors, written by its own compressor and read by lowbit.
PRESETS = ("W8A16", "W4A16", "W4A16_ASYM", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "NVFP4", "MXFP4A16",
           "MXFP4", "MXFP8A16", "MXFP8")  # fmt: skip


class Read(NamedTuple):
    """A convention that lowbit reads and keeps packed, and what its bits were compared with."""

    method: str
    variants: str
    compared: str
    test: str


READ = (
    Read(
        "compressed-tensors", ", ".join(f"`{p}`" for p in PRESETS), "the package's own compressor and decompressor",
        "checkpoints/test_by_compressed_tensors.py::test_we_read_what_the_package_wrote",
    ),
    Read(
        "lowbit", "every format", "the model that was saved",
        "test_checkpoint.py::test_every_format_comes_back_bit_by_bit",
    ),
    Read(
        "gptq", "2, 4 and 8 bits, version 1 and 2, symmetric and not, without activation order",
        "tensors written number by number", "checkpoints/test_foreign.py::test_gptq",
    ),
    Read("awq", "4 bits, gemm", "tensors written number by number", "checkpoints/test_foreign.py::test_awq"),
    Read(
        "bitsandbytes", "NF4 and FP4, nested or not; LLM.int8() weights",
        "tensors written number by number; for 4 bits also the package itself, where it is installed",
        "checkpoints/test_foreign.py::test_bitsandbytes_4_bits",
    ),
    Read(
        "fp8", "128x128 blocks; per tensor, dynamic and static",
        "tensors written number by number; for blocks also transformers' own decoder",
        "integrations/test_packed_formats.py::test_fp8_as_transformers_decodes_it",
    ),
    Read(
        "mxfp4", "gpt-oss experts, by `read` alone: no layer runs them packed", "transformers' own decoder",
        "integrations/test_packed_formats.py::test_gpt_oss_experts_as_transformers_decodes_them",
    ),
)  # fmt: skip


def written_rows() -> list[tuple[str, ...]]:
    """Scheme, format on disk, and what each reader makes of it."""
    rows = []
    for spec in WRITTEN:
        scheme = parse_config(spec).scheme
        known = ct.describe(scheme.weight, scheme.act)
        assert known is not None, spec
        weight_only = scheme.act is None
        if spec in REFUSED_BY_THE_PLAIN_CALL:
            plain = "refuses, as it does the package's own"
        elif spec in DECODED_TO_BF16:
            plain = "equal bits"
        else:
            plain = "equal bits and logits (fp32)" if weight_only else "equal bits (fp32)"
        rows.append((f"`{spec}`", f"`{known.format}`", "equal bits", "equal bits and logits", plain))
    return rows


def picked_rows() -> list[tuple[str, ...]]:
    """Scheme, and what the engines' own readers of compressed-tensors make of it."""
    assert PICKED.keys() == set(WRITTEN)
    why = {"ValueError": "refuses fp32 scales", "IndexError": "fails", "NotImplementedError": "refuses"}
    rows = []
    for spec in WRITTEN:
        vllm, sglang = PICKED[spec]
        refusal = why.get(sglang.partition(":")[0])
        rows.append((f"`{spec}`", f"`{vllm}`", refusal or f"`{sglang}`, tensors equal"))
    return rows


def read_rows() -> list[tuple[str, ...]]:
    """One row per `quant_method` that lowbit reads; each names a test that exists."""
    assert [row.method for row in READ] == list(READABLE)
    for row in READ:
        file, _, function = row.test.partition("::")
        assert re.search(rf"^def {function}\(", (TESTS / file).read_text(encoding="utf-8"), re.M), row.test
    return [(f"`{row.method}`", row.variants, row.compared, f"`{row.test}`") for row in READ]
