"""Errors that users meet. Each has a name, a code, and a page, docs/errors/<name>.md: what, why, and the way out.

Errors keep Python's own types; code and name stand at the end of the message, where a search engine or a reader finds
them:

    raise ValueError(f"cannot cut {w!r} at {edge}: ..." + see("cut-inside-tile"))
"""

from __future__ import annotations

from typing import NamedTuple


class Page(NamedTuple):
    """A code, which no other error ever gets, and one line of what the error says, with which its page opens."""

    code: str
    line: str


PAGES: dict[str, Page] = {
    # What was asked for.
    "bad-option": Page("LB1001", "A format, config or function was given an option or a value that it does not take."),
    "unknown-config": Page("LB1002", "A config's short name does not exist, or something else was given in its place."),
    "unknown-format": Page("LB1003", "A format spec begins with a word that no family has."),
    "unknown-kernel": Page("LB1004", "`use_kernel` was given a name that no kernel has."),
    "format-name-taken": Page("LB1005", "Two families of formats were registered under one name."),
    "conflicting-rules": Page("LB1006", "Rules by name and `filter_fn` were both given."),
    "rule-without-match": Page("LB1007", "A rule names no layer of the model."),
    "no-layer-selected": Page("LB1008", "`filter_fn` chose no layer, so nothing would be quantized."),
    "layer-not-quantizable": Page("LB1009", "A layer that was asked to be quantized cannot be."),
    "nothing-quantized": Page(
        "LB1010", "`explain`, `warmup` or `assert_no_dequant` was given a model without quantized layers."
    ),
    "already-quantized": Page("LB1011", "Weights that are quantized were given where the original ones are needed."),
    "no-blocks": Page("LB1012", "A model was to be calibrated block by block, and does not consist of such blocks."),
    "unknown-architecture": Page(
        "LB1013", "An algorithm must know which module feeds which, and does not know this model."
    ),
    "reference-mismatch": Page("LB1014", "A model was compared with a reference that was made from another text."),
    "missing-package": Page("LB1015", "A command needs a package that is not part of the plain installation."),
    # Values and memory.
    "nonfinite-weight": Page("LB2001", "A weight holds NaN or Inf."),
    "calibration-saw-nothing": Page(
        "LB2002", "A calibration had no batch, met no linear layer, or saw values that are not finite."
    ),
    "missing-calibration": Page("LB2003", "A static activation needs a scale that was neither calibrated nor given."),
    "out-of-memory": Page("LB2004", "Memory ran out while a model was quantized."),
    # Files.
    "checkpoint-refused": Page("LB3001", "A checkpoint cannot be written or read as asked; every problem is listed."),
    "journal-refused": Page(
        "LB3002", "A journal is of another run, is damaged, or its directory holds something else."
    ),
    "model-not-readable": Page("LB3003", "No language model that lowbit can read is at the given place."),
    "download-failed": Page("LB3004", "The demo's model could be neither found nor downloaded."),
    # Calls on quantized weights.
    "no-kernel": Page("LB4001", "No kernel takes this matmul, or the one asked for by name does not."),
    "input-mismatch": Page("LB4002", "The input of a quantized layer has a wrong dtype, size or device."),
    "id-out-of-range": Page("LB4003", "An embedding was asked for a row that its table does not have."),
    "context-exceeded": Page("LB4004", "More tokens were asked for than the model or its cache has positions."),
    "op-not-defined": Page(
        "LB4005", "A PyTorch operation was called on a quantized weight that cannot be done on packed codes."
    ),
    "copy-would-dequantize": Page(
        "LB4006", "A quantized weight was copied into a plain tensor, which would dequantize it."
    ),
    "cut-inside-tile": Page(
        "LB4007", "A slice or shard of a quantized weight would cut through weights that share a byte or a scale."
    ),
    "format-mismatch": Page("LB4008", "A quantized weight was overwritten by one of another format or shape."),
    "unsupported-dtype": Page(
        "LB4009", "A quantized weight was asked to present itself as something other than bf16, fp16 or fp32."
    ),
    "view-of-packed-weight": Page("LB4010", "A quantized weight was reshaped; packed weights have one shape."),
    "wrong-operand": Page("LB4011", "A quantized weight stands where only a plain tensor can."),
}


def see(name: str) -> str:
    """The end of a message: the error's code and its page."""
    assert name in PAGES, name
    return f" ({PAGES[name].code}) [lowbit: {name}]"
