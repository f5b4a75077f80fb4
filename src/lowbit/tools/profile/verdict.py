"""What was read decides: one verdict per layer, from the events that `taint.DequantTracer` recorded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from lowbit.tools.profile.layers import Layer
from lowbit.tools.profile.stacks import Frame, Stack
from lowbit.tools.profile.taint import PRODUCTS, Copy, Read

#: The memory contract's workspace: pieces of a weight that are dequantized one after the other stay below it.
WORKSPACE_BYTES = 64 << 20
#: A copy with this share of a weight's elements counts as a copy of the weight.
SHARE = 0.5


class Verdict(Enum):
    """How a layer's weight was used in a run."""

    FUSED = "fused"
    CHUNKED = "chunked"
    UNFUSED = "unfused"
    NOT_RUN = "not run"
    NOT_QUANTIZED = "not quantized"


@dataclass(frozen=True)
class LayerVerdict:
    """The verdict on a layer and what it rests on.

    Attributes:
        op: the operation that read the packed weight (fused), or that wrote the copy.
        reader: the operation that read the copy, or "".
        stack: the lines that called `op`, innermost first.
        calls: reads of the weight in the run; of a chunked one, all pieces together.
        copy_bytes: of the largest copy that was read; 0 if fused.
        written_bytes: of all copies in the run, those that led to the one that was read included.
        why: the verdict in words.
        witnesses: what the other witnesses say: True (a copy was seen), False, or absent (they did not look).
    """

    layer: Layer
    verdict: Verdict
    op: str = ""
    reader: str = ""
    kernel: str = ""
    stack: Stack = ()
    calls: int = 0
    copy_bytes: int = 0
    written_bytes: int = 0
    why: str = ""
    witnesses: Mapping[str, bool] = field(default_factory=dict)

    @property
    def where(self) -> Frame | None:
        """The line of Python that made the copy."""
        return self.stack[0] if self.stack and self.copy_bytes else None


@dataclass(frozen=True)
class Verdicts:
    """One verdict per layer of a model; `print` it."""

    layers: tuple[LayerVerdict, ...]

    def of(self, verdict: Verdict) -> list[LayerVerdict]:
        return [v for v in self.layers if v.verdict is verdict]

    @property
    def quantized(self) -> list[LayerVerdict]:
        return [v for v in self.layers if v.layer.quantized]

    @property
    def summary(self) -> str:
        """One line: how many layers there are of each verdict."""
        if not self.quantized:
            found = f"{len(self.layers)} layers, all in floating point" if self.layers else "no layer has a weight"
            return f"nothing is quantized: {found}"
        counts = {v: len(self.of(v)) for v in Verdict}
        return ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items() if count)

    def __str__(self) -> str:
        rows = [("layer", "scheme", "bits", "verdict", "copy MB", "how")]
        for members in groups(self.layers):
            first = members[0]
            more = f" and {len(members) - 1} more" if len(members) > 1 else ""
            size = f"{first.copy_bytes / 1e6:.2f}" if first.copy_bytes else ""
            rows.append((first.layer.name + more, first.layer.scheme, f"{first.layer.bits:.2f}", first.verdict.value,
                         size, first.why))  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        right = (2, 4)
        lines = [
            "  ".join(
                [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))] + [row[-1]]
            )
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in (*lines, self.summary))


def groups(layers: Sequence[LayerVerdict]) -> list[list[LayerVerdict]]:
    """Layers about which the same is to be said, in the order of the first of each."""
    out: dict[tuple[object, ...], list[LayerVerdict]] = {}
    for v in layers:
        key = (v.layer.scheme, v.layer.elements, v.layer.kind, v.verdict, v.why)
        out.setdefault(key, []).append(v)
    return list(out.values())


def judge(
    layers: Iterable[Layer],
    reads: Iterable[Read],
    written: Iterable[tuple[str, Copy]],
    ran: Collection[str] = (),
    caches: Collection[str] = (),
) -> Verdicts:
    """The verdict on every layer. Pure: the same events give the same verdicts.

    Args:
        ran: names of the modules that ran.
        caches: modules whose codes the run itself wrote, so that they are no weights.
    """
    by_layer: dict[str, list[Read]] = {}
    for read in reads:
        by_layer.setdefault(read.layer, []).append(read)
    copied: dict[str, int] = {}
    for name, copy in written:
        copied[name] = copied.get(name, 0) + copy.bytes
    out = []
    for layer in layers:
        if layer.name in caches:
            continue
        seen = by_layer.get(layer.name, [])
        out.append(_judge(layer, seen, copied.get(layer.name, 0), any(n in ran for n in layer.names)))
    return Verdicts(tuple(out))


def _judge(layer: Layer, reads: list[Read], written: int, ran: bool) -> LayerVerdict:
    if not layer.quantized:
        return LayerVerdict(layer, Verdict.NOT_QUANTIZED)
    if not reads and ran:
        # Kernels that are launched without PyTorch's dispatcher read what they are given.
        return LayerVerdict(layer, Verdict.FUSED, why="no operation of PyTorch read its codes: its own kernel does")
    if not reads:
        return LayerVerdict(layer, Verdict.NOT_RUN, why="its codes met no input of the model")
    copies = [(r, r.copy) for r in reads if r.copy is not None and _is_wide(r.copy, layer)]
    whole = [(r, c) for r, c in copies if _is_whole(r, c, layer)]
    if whole:
        read, copy = max(whole, key=lambda pair: pair[1].bytes)
        size = max(copy.bytes, read.bytes)
        return LayerVerdict(
            layer, Verdict.UNFUSED, copy.op, read.op, copy.kernel, copy.stack, len(whole), size, written,
            _unfused(read, copy, layer),
        )  # fmt: skip
    # Sums of a weight's rows and the like are pieces too, but no product reads them in place of the weight.
    pieces = [pair for pair in copies if pair[0].op.partition("::")[2].rstrip("_") in PRODUCTS]
    if all(r.copy is not None for r in reads):
        pieces = copies
    if pieces:
        read, copy = max(pieces, key=lambda pair: pair[1].bytes)
        by = f"{read.inside} ({read.kernel})" if read.kernel else read.inside or read.op
        return LayerVerdict(
            layer, Verdict.CHUNKED, copy.op, read.op, copy.kernel, copy.stack, len(pieces), copy.bytes, written,
            f"{by} reads copies of at most {100 * copy.elements / layer.elements:.3g} % of the weight",
        )  # fmt: skip
    codes = [r for r in reads if r.copy is None] or reads
    first = next((r for r in codes if r.kernel), codes[0])
    by = f"{first.inside or first.op} ({first.kernel})" if first.kernel else first.inside or first.op
    return LayerVerdict(
        layer, Verdict.FUSED, first.op, "", first.kernel, first.stack, _calls(codes), why=f"{by} reads codes"
    )


def _calls(reads: list[Read]) -> int:
    """Reads from outside; what a library's operation does inside belongs to its own read."""
    return sum(not r.inside for r in reads) or len(reads)


def _is_wide(copy: Copy, layer: Layer) -> bool:
    return copy.floating or 8 * copy.bytes / copy.elements > layer.bits


def _is_whole(read: Read, copy: Copy, layer: Layer) -> bool:
    if copy.bytes > WORKSPACE_BYTES:
        return True
    if read.kernel and read.kernel != "reference":
        return False  # lowbit's kernels have a workspace, into which a small weight may fit at once
    # A buffer that was filled piece by piece is as large as all of them.
    return max(copy.elements, read.elements) >= SHARE * layer.elements


def _unfused(read: Read, copy: Copy, layer: Layer) -> str:
    line = f" at {copy.stack[0]}" if copy.stack else ""
    kernel = f" by lowbit's {copy.kernel} kernel" if copy.kernel else ""
    share = max(copy.elements, read.elements) / layer.elements
    what = "the whole weight" if share >= 1 else f"{100 * share:.0f} % of the weight"
    return f"{copy.op} writes {what}{kernel}{line}, {read.op} reads it"
