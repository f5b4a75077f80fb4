"""What to do about it: rules over the evidence, each with a number or it is not said."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lowbit.tools.profile.kernels import Gaps, LayerTime
from lowbit.tools.profile.memory import Timeline
from lowbit.tools.profile.verdict import LayerVerdict, Verdict, Verdicts

#: Below these shares a suggestion would not be worth its line.
_IDLE, _SLOW, _SPIKE, _FLOAT = 0.2, 0.5, 0.25, 0.1


@dataclass(frozen=True)
class Suggestion:
    """Something to change.

    Attributes:
        rule: name of the rule, for programs.
        text: what was seen and what to do.
        gain: what it is expected to bring, as a number with its unit.
        layers: what it is about.
    """

    rule: str
    text: str
    gain: str
    layers: tuple[str, ...] = ()


def suggest(
    verdicts: Verdicts,
    timeline: Timeline,
    layers: Sequence[LayerTime],
    gaps: Iterable[Gaps],
    ceiling_gb_s: float | None,
) -> list[Suggestion]:
    """What the evidence asks for, the worst first."""
    out = [*_unfused(verdicts, ceiling_gb_s), *_idle(gaps)]
    out += [*_float_layers(verdicts), *_slow_layers(verdicts, layers), *_spikes(verdicts, timeline)]
    return out


def megabytes(size: float) -> str:
    """As text; small sizes in kB."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _unfused(verdicts: Verdicts, ceiling_gb_s: float | None) -> Iterator[Suggestion]:
    """A copy that is written is also read: by what writes the next copy, and in the end by the product."""
    unfused = verdicts.of(Verdict.UNFUSED)
    if not unfused:
        return
    stored = sum(v.layer.stored_bytes for v in unfused)
    # `written` counts every run that was traced; a run reads a layer as often as it was called.
    written = sum((v.written_bytes or v.copy_bytes) / max(v.calls, 1) for v in unfused)
    ratio = (stored + 2 * written) / stored
    peak = max(v.copy_bytes for v in unfused)
    lines = dict.fromkeys(str(v.where) for v in unfused if v.where is not None)
    at = f" at {next(iter(lines))}" + (f" and {len(lines) - 1} other lines" if len(lines) > 1 else "") if lines else ""
    gain = f"{ratio:.1f} times less memory traffic for these weights, {megabytes(peak)} less at the peak"
    if ceiling_gb_s:
        gain += f", at least {2 * written / ceiling_gb_s / 1e6:,.2f} ms per forward at {ceiling_gb_s:.0f} GB/s"
    yield Suggestion(
        "unfused-dequant",
        f"{len(unfused)} of {len(verdicts.quantized)} quantized layers are dequantized for every forward{at}: "
        f"{written / stored:.1f} bytes are written and read again per stored byte. Use a scheme whose kernel reads the "
        f"codes ({_fused_scheme(unfused[0])})",
        gain,
        tuple(v.layer.name for v in unfused),
    )


def _fused_scheme(v: LayerVerdict) -> str:
    if v.kernel == "reference":
        return "leave out lowbit.use_kernel('reference')"
    name = "int4wo-128" if v.layer.bits < 6 else "float8wo" if "float8" in v.layer.scheme.lower() else "int8wo"
    return f"lowbit.quantize_(model, '{name}') on the original weights"


def _float_layers(verdicts: Verdicts) -> Iterator[Suggestion]:
    """16-bit weights of layers that multiply, in a model that is quantized otherwise."""
    left = [
        v for v in verdicts.of(Verdict.NOT_QUANTIZED) if v.layer.kind in ("Linear", "NonDynamicallyQuantizableLinear")
    ]
    total = sum(v.layer.stored_bytes for v in verdicts.layers)
    size = sum(v.layer.stored_bytes for v in left)
    if not verdicts.quantized or not left or size < _FLOAT * total:
        return
    saved = size - sum(v.layer.elements for v in left)
    yield Suggestion(
        "float-layers",
        f"{len(left)} of {len(left) + len(verdicts.quantized)} layers are not quantized and hold "
        f"{100 * size / total:.0f} % of all weight bytes. Rules by name quantize them too, in 8 bits if their accuracy "
        "matters most",
        f"{megabytes(saved)} smaller with 8 bits, {100 * saved / total:.0f} % of what is read per token",
        tuple(v.layer.name for v in left),
    )


def _slow_layers(verdicts: Verdicts, layers: Sequence[LayerTime]) -> Iterator[Suggestion]:
    """While one token at a time is generated, a layer takes as long as its weight needs to be read, or wastes time."""
    packed = {v.layer.name for v in verdicts.quantized if v.verdict is not Verdict.UNFUSED}
    decode = [t for t in layers if t.phase == "decode" and t.share is not None and t.layer in packed]
    slow = [t for t in decode if t.share is not None and t.share < _SLOW]
    if not slow:
        return
    lost = sum(t.us * (1 - (t.share or 0)) for t in slow)
    total = sum(t.us for t in decode)
    worst = min(slow, key=lambda t: t.share or 0)
    yield Suggestion(
        "below-bandwidth",
        f"{len(slow)} of {len(decode)} packed layers read their weights at less than {100 * _SLOW:.0f} % of the "
        f"measured bandwidth while decoding, {worst.layer} at {100 * (worst.share or 0):.0f} %. Fuse small layers "
        "(q, k, v; gate, up), decode more sequences at once, or see what lowbit.explain says of the kernel",
        f"up to {lost / 1e3:,.2f} ms of {total / 1e3:,.2f} ms per token in these layers",
        tuple(t.layer for t in slow),
    )


def _idle(gaps: Iterable[Gaps]) -> Iterator[Suggestion]:
    for g in gaps:
        if g.phase == "decode" and g.idle > _IDLE:
            yield Suggestion(
                "launch-gaps",
                f"the GPU waits {100 * g.idle:.0f} % of the time while decoding, for {g.launches} kernels to be "
                "launched. Capture a step in a CUDA graph",
                f"up to {1 / max(1 - g.idle, 0.01):.1f} times as many tokens per second",
            )


def _spikes(verdicts: Verdicts, timeline: Timeline) -> Iterator[Suggestion]:
    """The phase after loading whose peak stands out most over what it found."""
    running = [p for p in timeline.phases if p.phase not in ("", "load", "quantize")]
    if not running:
        return
    p = max(running, key=lambda p: p.peak - p.before)
    total = sum(v.layer.stored_bytes for v in verdicts.layers)
    rise = p.peak - p.before
    if p.spikes and p.spikes[0].bytes > _SPIKE * total:
        top = p.spikes[0]
        where = str(top.stack[0]) if top.stack else "an unknown line"
        more = f" and {len(top.layers) - 1} more layers" if len(top.layers) > 1 else ""
        inside = f", in layer {top.layers[0]}{more}" if top.layers else ""
        yield Suggestion(
            "memory-spike",
            f"{p.phase} needs {megabytes(rise)} beyond what was in use, {100 * rise / total:.0f} % of the weights' "
            f"size; {megabytes(top.bytes)} of it in {top.count} blocks from {where}{inside}",
            f"{megabytes(top.bytes)} less at the peak of {p.phase}",
            top.layers,
        )
