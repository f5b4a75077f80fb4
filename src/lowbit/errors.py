"""Names of the errors that users meet. Each has a page, docs/errors/<name>.md: what, why, and the way out.

Errors keep Python's own types; the name stands at the end of the message, where a search engine or a reader finds it:

    raise ValueError(f"cannot cut {w!r} at {edge}: ..." + see("cut-inside-tile"))
"""

from __future__ import annotations

#: Name of an error -> what it says in one line, the same that its page opens with.
PAGES: dict[str, str] = {
    "already-quantized": "Weights that are quantized were given where the original ones are needed.",
    "bad-option": "A format, config or function was given an option or a value that it does not take.",
    "calibration-saw-nothing": "A calibration had no batch, met no linear layer, or saw values that are not finite.",
    "checkpoint-refused": "A checkpoint cannot be written or read as asked; every problem is listed.",
    "conflicting-rules": "Rules by name and `filter_fn` were both given.",
    "context-exceeded": "More tokens were asked for than the model or its cache has positions.",
    "copy-would-dequantize": "A quantized weight was copied into a plain tensor, which would dequantize it.",
    "cut-inside-tile": "A slice or shard of a quantized weight would cut through weights that share a byte or a scale.",
    "download-failed": "The demo's model could be neither found nor downloaded.",
    "format-mismatch": "A quantized weight was overwritten by one of another format or shape.",
    "format-name-taken": "Two families of formats were registered under one name.",
    "id-out-of-range": "An embedding was asked for a row that its table does not have.",
    "input-mismatch": "The input of a quantized layer has a wrong dtype, size or device.",
    "journal-refused": "A journal is of another run, is damaged, or its directory holds something else.",
    "layer-not-quantizable": "A layer that was asked to be quantized cannot be.",
    "missing-calibration": "A static activation needs a scale that was neither calibrated nor given.",
    "missing-package": "A command needs a package that is not part of the plain installation.",
    "model-not-readable": "No language model that lowbit can read is at the given place.",
    "no-blocks": "A model was to be calibrated block by block, and does not consist of such blocks.",
    "no-kernel": "No kernel takes this matmul, or the one asked for by name does not.",
    "no-layer-selected": "`filter_fn` chose no layer, so nothing would be quantized.",
    "nonfinite-weight": "A weight holds NaN or Inf.",
    "nothing-quantized": "`explain`, `warmup` or `assert_no_dequant` was given a model without quantized layers.",
    "op-not-defined": "A PyTorch operation was called on a quantized weight that cannot be done on packed codes.",
    "out-of-memory": "Memory ran out while a model was quantized.",
    "reference-mismatch": "A model was compared with a reference that was made from another text.",
    "rule-without-match": "A rule names no layer of the model.",
    "unknown-architecture": "An algorithm must know which module feeds which, and does not know this model.",
    "unknown-config": "A config's short name does not exist, or something else was given in its place.",
    "unknown-format": "A format spec begins with a word that no family has.",
    "unknown-kernel": "`use_kernel` was given a name that no kernel has.",
    "unsupported-dtype": "A quantized weight was asked to present itself as something other than bf16, fp16 or fp32.",
    "view-of-packed-weight": "A quantized weight was reshaped; packed weights have one shape.",
    "wrong-operand": "A quantized weight stands where only a plain tensor can.",
}


def see(name: str) -> str:
    """The end of a message: a pointer to the error's page."""
    assert name in PAGES, name
    return f" [lowbit: {name}]"
