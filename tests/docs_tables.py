"""The tables of docs/ that the registries know: rendered here, compared in test_docs.py.

`python tests/docs_tables.py` writes them into their pages after a format or config was added.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lowbit import parse_config
from lowbit.formats import Format, Plane, registered
from lowbit.formats.elements import Element, FloatElement, IntElement, TableElement
from lowbit.specs import EXAMPLES

DOCS = Path(__file__).resolve().parent.parent / "docs"
SCALE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e8m0fnu: "e8m0"}
SCALE_NAMES |= {torch.float8_e4m3fn: "e4m3", torch.int8: "int8", torch.uint8: "uint8"}


def element(e: Element) -> str:
    if isinstance(e, IntElement):
        return f"{e.bits}-bit integer" + ("" if e.symmetric else ", unsigned")
    if isinstance(e, FloatElement):
        return f"{e.bits}-bit float, E{e.exponent_bits}M{e.mantissa_bits}"
    assert isinstance(e, TableElement)
    return f"table of {1 << e.bits}" + (f" vectors of {e.vector}" if e.vector > 1 else "")


def scale(p: Plane) -> str:
    name = "" if p.name == "scale" else p.name.replace("_", " ") + " "
    if p.shape is not None:
        return f"{name}{SCALE_NAMES[p.dtype]} {'x'.join(map(str, p.shape))}"
    over = {(None, None): "the tensor", (1, None): "row"}.get((p.n, p.k))
    over = over or (f"{p.k} along K" if p.n == 1 else f"{p.n}x{p.k} block")
    return f"{name}{SCALE_NAMES[p.dtype]} per {over}".replace("per the tensor", "per tensor")


def format_row(fmt: Format) -> tuple[str, ...]:
    scales = "; ".join(scale(p) for p in fmt.scale_planes)
    return f"`{fmt.spec}`", f"{fmt.bits_per_weight:.4g}", element(fmt.element), scales


def config_row(name: str) -> tuple[str, ...]:
    config = parse_config(name)
    weight, act = config.scheme
    return f"`{config.spec}`", f"`{type(config).__name__}`", f"`{weight.spec}`", f"`{act.spec}`" if act else "-"


TABLES = {
    "formats.md": (
        ("spec", "bits per weight", "element", "scales"),
        [format_row(f) for f in registered()],
    ),
    "configs-and-rules.md": (
        ("short name", "config", "weight", "activation"),
        [config_row(name) for name in EXAMPLES],
    ),
}


def render(page: str) -> str:
    header, rows = TABLES[page]
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def section(text: str) -> re.Match[str]:
    """The part of a page between `<!-- table -->` and the next empty line or the page's end."""
    found = re.search(r"(?<=<!-- table: python tests/docs_tables.py -->\n).*?(?=\n\n|\n?\Z)", text, re.S)
    assert found is not None, "the page has no <!-- table: ... --> mark"
    return found


if __name__ == "__main__":
    for page in TABLES:
        text = (DOCS / page).read_text()
        at = section(text)
        (DOCS / page).write_text(text[: at.start()] + render(page).rstrip("\n") + text[at.end() :])
