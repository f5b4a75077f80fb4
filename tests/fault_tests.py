"""Faults that have tests of their own beside what they concern: rows of docs/reliability.md (docs_tables.py)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent


class Row(NamedTuple):
    """What happens, what lowbit does, and the function that tests it; those in `gpu/` need a GPU."""

    happens: str
    promise: str
    test: str


ROWS = (
    Row(
        "N or K is no multiple of a tile or group", "right for every pair of 1, 2, 3, 31, ... 129",
        "test_ops.py::test_every_pair_of_n_and_k",
    ),
    Row("no tokens, one, or any number; 3-D inputs", "right, or empty", "test_ops.py::test_every_m"),
    Row(
        "inputs that are transposed, strided or offset", "bits of the contiguous input",
        "test_ops.py::test_views_are_bit_equal_to_contiguous",
    ),
    Row("inputs of another dtype, size or device", "named", "test_ops.py::test_wrong_calls_are_named"),
    Row(
        "a cut inside a group or a byte", "refused, tile and format named",
        "test_tensor.py::test_a_cut_inside_a_tile_is_named",
    ),
    Row(
        "no kernel for a problem", "an error that lists every kernel and why not",
        "kernels/test_select.py::test_when_nothing_applies_every_reason_is_listed",
    ),
    Row(
        "a quantized weight is decoded in secret", "never chosen",
        "kernels/test_select.py::test_the_reference_is_never_chosen_on_a_gpu",
    ),
    Row("more than 2^31 elements", "right", "gpu/test_linear.py::test_offsets_beyond_int32"),
    Row(
        "reads or writes beyond a buffer (C code)", "none, by the address and undefined-behaviour sanitizers",
        "kernels/test_native.py::test_stays_inside_its_buffers",
    ),
    Row(
        "scales that would be NaN, Inf or 0 on disk", "all named before a file is written",
        "test_checkpoint.py::test_save_names_every_unfit_weight_and_writes_nothing",
    ),
    Row(
        "a weight far larger than the others of its layer", "noted in the report, with the SQNR that is left",
        "test_quantize.py::test_low_sqnr_is_noted",
    ),
    Row(
        "torch's default dtype is another, as engines set it, while a format rounds", "equal bits",
        "formats/test_values.py::test_the_default_dtype_changes_nothing",
    ),
    Row(
        "code that opens a pickle, or runs text", "none in the source",
        "test_layers.py::test_house_rules",
    ),
    Row(
        "ops that PyTorch's own checks find fault with (`opcheck`)", "none", "test_ops.py::test_opcheck",
    ),
    Row(
        "a warning, a GPU or another package at import", "none", "test_import.py::test_import_is_quick_silent_and_lean",
    ),
    Row("other rows in the batch", "equal bits, where asked for", "gpu/test_wgmma.py::test_batch_invariance"),
    Row(
        "a rule that reaches no layer, in vLLM too", "an error that names it",
        "integrations/test_vllm.py::test_what_does_not_fit_is_refused",
    ),
    Row(
        "an engine that passes over tensors it does not know", "what is missing is named",
        "integrations/test_sglang.py::test_what_does_not_fit_is_refused",
    ),
    Row("runs that differ", "equal bits", "gpu/test_execution.py::test_repeated_runs_give_the_same_bits"),
    Row(
        "a CUDA graph before kernels are compiled", "an error that names `warmup`",
        "gpu/test_gpu_warmup.py::test_without_a_warmup_the_error_names_it",
    ),
    Row(
        "`torch.compile` with changing numbers of tokens", "one graph",
        "test_compile.py::test_fullgraph_and_one_recompilation_for_any_m",
    ),
    Row(
        "a damaged kernel in the cache", "made again",
        "kernels/test_cuda_compile.py::test_a_damaged_file_is_made_again",
    ),
    Row(
        "damaged C code in the cache", "made again",
        "kernels/test_native.py::test_a_damaged_library_is_made_again",
    ),
    Row(
        "a cache that cannot be written", "compiled without it",
        "kernels/test_cuda_compile.py::test_without_a_cache_kernels_are_compiled",
    ),
    Row(
        "a cache that others can write", "readable and writable by its user alone",
        "kernels/test_cuda_compile.py::test_cache_is_its_users_own",
    ),
    Row(
        "NaN or Inf while transformers loads", "named before anything is quantized",
        "integrations/test_transformers.py::test_a_nan_is_named",
    ),
    Row(
        "a reader that does not know lowbit", "stops, never random weights",
        "integrations/test_transformers.py::test_without_lowbit_our_own_convention_is_refused",
    ),
    Row("more memory than packed weights and a workspace", "none", "gpu/test_memory.py::test_peak_memory"),
)  # fmt: skip


def rows() -> list[tuple[str, ...]]:
    """Each names a test that exists."""
    for row in ROWS:
        file, _, function = row.test.partition("::")
        assert re.search(rf"^def {function}\(", (TESTS / file).read_text(encoding="utf-8"), re.M), row.test
    return [(row.happens, row.promise, f"`{row.test}`") for row in ROWS]
