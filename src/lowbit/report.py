"""`Report`: what `quantize_` did, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class LayerReport:
    """One layer. A layer that was left alone has `skipped`, the reason, and no format."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    format: str | None
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None
    skipped: str | None = None
    note: str | None = None


@dataclass
class Report:
    """The layers in the model's order, with totals. `print(report)` shows a table, `to_json()` gives data.

    Attributes:
        from_journal: how many of the layers an earlier run had quantized, which this one went on behind.
    """

    layers: list[LayerReport] = field(default_factory=list)
    seconds: float = 0.0
    from_journal: int = 0

    @property
    def quantized(self) -> list[LayerReport]:
        return [r for r in self.layers if r.skipped is None]

    @property
    def skipped(self) -> list[LayerReport]:
        return [r for r in self.layers if r.skipped is not None]

    @property
    def bytes_before(self) -> int:
        return sum(r.bytes_before for r in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(r.bytes_after for r in self.layers)

    @property
    def worst(self) -> LayerReport | None:
        """The quantized layer with the lowest SQNR."""
        rated = [r for r in self.quantized if r.sqnr_db is not None]
        return min(rated, key=lambda r: r.sqnr_db or 0.0) if rated else None

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def to_json(self) -> str:
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "seconds": self.seconds}
        totals["from_journal"] = self.from_journal
        return json.dumps({"layers": [asdict(r) for r in self.layers], **totals}, indent=1)

    def __str__(self) -> str:
        rows = [("layer", "shape", "format", "MB before", "MB after", "SQNR dB", "note")]
        for r in self.layers:
            note = r.note or ("" if r.skipped is None else f"skipped: {r.skipped}")
            sqnr = "" if r.sqnr_db is None else f"{r.sqnr_db:.1f}"
            shape = "x".join(map(str, r.shape))
            rows.append((r.name, shape, r.format or "-", _mb(r.bytes_before), _mb(r.bytes_after), sqnr, note))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
        lines.append(
            f"{len(self.quantized)} layers quantized, {len(self.skipped)} left alone; "
            f"{_mb(self.bytes_before)} MB -> {_mb(self.bytes_after)} MB in {self.seconds:.1f} s"
        )
        return "\n".join(lines)


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"
