"""`lowbit profile`: what it prints and writes, its exit codes."""

import gzip
import json

import pytest
from test_cli import document, run
from tiny_model_dir import write_model

import lowbit

SMALL = ("--prompt-tokens", 12, "--new-tokens", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("profile") / "model")


def test_it_says_what_stays_packed(model, tmp_path):
    html = tmp_path / "new" / "report.html"
    shown = run("profile", model, "--config", "int4wo-32", *SMALL, "--html", html, "--fail-on", "unfused-dequant")
    assert "14 fused, 1 not quantized" in shown.stdout
    for word in ("load", "quantize", "warm-up", "prefill", "decode", "tokens/s", "int4:g32:asym", "report.trace"):
        assert word in shown.stdout
    page = html.read_text()
    assert "0 of 14 dequantize" in page
    assert "http" not in page
    assert json.loads(html.with_suffix(".json").read_text())["schema"] == "lowbit-profile/1"
    trace = json.loads(gzip.decompress((tmp_path / "new" / "report.trace.json.gz").read_bytes()))
    assert any(e["name"] == "lowbit.layer=model.layers.1.mlp.down_proj" for e in trace["traceEvents"])


def test_dequantization_fails_where_it_is_asked_to(model):
    words = ("profile", model, "--config", "int8wo", *SMALL)
    with lowbit.use_kernel("reference"):
        got = document(*words)
        assert got["verdicts"]["summary"] == "14 unfused, 1 not quantized"
        assert got["suggestions"][0]["rule"] == "unfused-dequant"
        failed = run(*words, "--fail-on", "unfused-dequant", code=3)
    assert "14 layers are dequantized" in failed.stderr
    assert got["tokens"] == {"prefill": 12, "decode": 2}


def test_an_original_model_has_nothing_to_find(model):
    shown = run("profile", model, *SMALL, "--fail-on", "unfused-dequant")
    assert "nothing is quantized: 15 layers" in shown.stdout


def test_bad_input(model):
    assert "unfused-dequant" in run("profile", model, "--fail-on", "anything", code=2).stderr
    run("profile", model, "--new-tokens", 0, code=2)
    run("profile", model, "--config", "int44wo", code=2)
    assert "context" in run("profile", model, "--prompt-tokens", 500, code=2).stderr
