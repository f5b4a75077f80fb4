"""The HTML report: complete, self-contained, well-formed."""

import json
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from html_page import check_self_contained, parse

from lowbit.tools.demo import FULL, DemoResult, DemoRow
from lowbit.tools.evaluate import EvalResult
from lowbit.tools.page import COLOURS, figure, standalone, svg
from lowbit.tools.report import family, render, write_report

LAYERS = [f"model.layers.{i}.mlp.{kind}_proj" for i in range(3) for kind in ("gate", "up", "down")]


def row(config, bits, kl, sqnr=20.0):
    quality = EvalResult(99, 15.0, 0.5, 1.0, 1 + kl, 0.01, kl, kl / 10, kl * 5, 1 - kl / 2)
    layers = {name: sqnr + i for i, name in enumerate(LAYERS)} if sqnr else {}
    return DemoRow(config, int(1e6 * (4 + bits)), int(1e6 * bits), bits, quality, 3.5, 20.0, "<b>Hello</b> & more", 1.0,
                   layers, ("torch_blocked",) if sqnr else ())  # fmt: skip


@pytest.fixture(scope="module")
def result():
    kinds = (("float8wo", 8, 0.01), ("int4wo-32", 4.75, 0.3), ("mxfp4wo", 4.25, 0.5), ("nf4wo-64", 4.5, 0.2))
    rows = [row("bf16", 16, 0.0, None), *(row(*kind) for kind in kinds)]
    return DemoResult("tiny <model>", 1000, "CPU", "Why?", FULL, {"torch": "2"}, ["A note."], rows, 2.0, "lowbit demo")


@pytest.fixture(scope="module")
def page(result):
    return parse(render(result))


def test_nothing_is_loaded_from_anywhere(result, page):
    check_self_contained(render(result), page)


def test_every_config_and_number_is_there(result, page):
    text = " ".join(" ".join(page.text).split())
    for r in result.rows:
        assert r.config in text
        assert f"{r.bits_per_weight:.3f}" in text
    assert "lowbit demo" in text
    assert "A note." in text
    assert page.tags.count("svg") == 3
    assert page.tags.count("tr") == len(result.rows) + 1


def test_text_of_models_is_text(result, page):
    assert "<b>Hello</b> & more" in "".join(page.text)
    assert "b" not in page.tags


def test_the_same_result_gives_the_same_page(result):
    assert render(result) == render(result)


def test_json_has_everything_and_no_nan(result, tmp_path):
    rows = [replace(r, tokens_per_second=math.nan) for r in result.rows]
    write_report(replace(result, rows=rows), tmp_path / "a.html", tmp_path / "a.json")

    def refuse(word):
        raise AssertionError(word)

    data = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert [r["config"] for r in data["rows"]] == [r.config for r in result.rows]
    assert data["rows"][1]["tokens_per_second"] is None
    assert data["rows"][1]["quality"]["kl_mean"] == result.rows[1].quality.kl_mean
    assert "nan" not in (tmp_path / "a.html").read_text().lower().replace("nanmin", "")


def test_an_original_alone_is_a_report_too(result):
    html = render(replace(result, rows=result.rows[:1]))
    assert html.count("<svg") == 1


def test_a_report_of_nothing_is_an_error(result):
    with pytest.raises(ValueError, match="at least one"):
        render(replace(result, rows=[]))


def test_a_plot_as_a_file_of_its_own():
    plot, axes = figure(4, 3)
    axes.plot([0, 1 / 3], [1, 2], color=COLOURS["--bad"])
    text = standalone(svg(plot, "A plot"))
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in text
    assert "#d23f3f" in text
    assert not re.search(r"\d\.\d{3}", text.partition("</defs>")[2])


def test_families(result):
    titles = [family(r).title for r in result.rows]
    assert titles == ["original", "float8", "integers", "MX and NVFP4", "tables"]
