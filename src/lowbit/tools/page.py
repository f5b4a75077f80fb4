"""What HTML pages of results share: packages they need, templates, plots as SVG in the page's colours, JSON.

Plots are drawn in stand-in colours that become the page's CSS variables, so that they follow its light and dark themes.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
from importlib import resources
from typing import Any

from lowbit.errors import see

#: Stand-in colours of the plots and the CSS variables of templates/style.css that replace them.
_VARIABLES = {
    "#010101": "--text", "#020202": "--muted", "#030303": "--line", "#040404": "--float", "#050505": "--int",
    "#060606": "--block", "#070707": "--table", "#080808": "--original", "#090909": "--card", "#0a0a0a": "--bad",
}  # fmt: skip
COLOURS = {name: colour for colour, name in _VARIABLES.items()}
_PACKAGES = ("jinja2", "matplotlib")


def require_packages() -> None:
    """Say what is missing before minutes of measuring, not after.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    missing = [p for p in _PACKAGES if importlib.util.find_spec(p) is None]
    if missing:
        raise ImportError(
            f"the report needs {' and '.join(missing)}; pip install 'lowbit[cli]'" + see("missing-package")
        )


def render_template(name: str, **values: Any) -> str:
    """A template of tools/templates with its values.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    require_packages()
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("lowbit.tools", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name).render(**values)


def finite(value: Any) -> Any:
    """The value with None for NaN and Inf, which JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes in the page's colours, no global state of matplotlib touched."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    made.patch.set_visible(False)
    axes = made.add_subplot()
    axes.patch.set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(COLOURS["--line"])
    axes.tick_params(which="both", color=COLOURS["--line"], labelcolor=COLOURS["--muted"], labelsize=9)
    axes.set_axisbelow(True)
    return made, axes


def svg(figure: Any, label: str) -> str:
    """The figure as an `<svg>` element: no fixed size, no metadata, text as text, colours as CSS variables."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=96)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    # Ids of several figures meet in one page.
    prefix = re.sub(r"\W", "", label)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r"url\(#", f"url(#{prefix}-", body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}-', body).replace("xlink:href", "href")
    body = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "system-ui, sans-serif", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return f'<svg {box.group(0)} role="img" aria-label="{label}">{body}'


def standalone(svg: str) -> str:
    """An `<svg>` of a page as a file of its own: on a card in the page's light colours, coordinates to a hundredth."""
    style = resources.files("lowbit.tools").joinpath("templates/style.css").read_text()
    light = dict(re.findall(r"(--\w+): (#\w+);", style.partition("}")[0]))
    svg = re.sub(r"var\((--\w+)\)", lambda m: light[m[1]], svg)
    svg = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), svg)
    head, _, body = svg.partition(">")
    card = f'<rect width="100%" height="100%" fill="{light["--card"]}"/>'
    return head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"') + ">" + card + body + "\n"
