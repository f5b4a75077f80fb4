"""Every command on a tiny model: its output, its JSON, its exit codes and its messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model_dir import CONFIG, write_model
from typer.testing import CliRunner

import lowbit
from lowbit.cli.app import app
from lowbit.cli.generate import Text
from lowbit.models.tokenizer import load_tokenizer
from lowbit.specs import EXAMPLES
from lowbit.tools.sources import find_source, huggingface_config, parse_rules, save_tokenizer
from lowbit.tools.tasks import TaskResult

COMMANDS = ("demo", "quantize", "verify", "load", "generate", "eval", "inspect", "explain", "warmup",
            "profile", "doctor", "bench linear", "bench generate")  # fmt: skip
SMALL = ("--tokens", "100", "--window", "50")


def run(*words: object, code: int = 0):
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return result


def document(*words: object, code: int = 0):
    """The command's `--json`: exactly one document on stdout, with no NaN or Inf in it."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(run(*words, "--json", code=code).stdout, parse_constant=refuse)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), template=True)


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "int4"
    run("quantize", model, out, "--config", "int4wo-32")
    return out


# quantize, verify, load --------------------------------------------------------------------------


def test_a_quantized_directory_is_a_model(model, quantized):
    source = find_source(str(quantized))
    assert source.kind == "checkpoint"
    loaded, original = source.model(), find_source(str(model)).model()
    lowbit.quantize_(original, {"_default": "int4wo-32", "lm_head": None})
    ids = torch.arange(12).view(1, -1)
    assert torch.equal(loaded(ids), original(ids))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert source.tokenizer().encode("sky") == find_source(str(model)).tokenizer().encode("sky")
    assert source.tokenizer().chat_template == find_source(str(model)).tokenizer().chat_template


def test_quantize_says_what_it_did(model, tmp_path):
    got = document("quantize", model, tmp_path / "o", "-c", "int8wo", "--rule", "re:.*down_proj=int4wo-32",
                   "--rule", "model.layers.0.self_attn.q_proj=none")  # fmt: skip
    formats = {layer["name"]: layer["format"] for layer in got["layers"]}
    assert formats["model.layers.1.mlp.down_proj"] == "int4:g32:asym"
    assert formats["model.layers.1.mlp.up_proj"] == "int8:row"
    assert formats["model.layers.0.self_attn.q_proj"] is None
    assert formats["lm_head"] is None
    assert got["bytes_after"] < got["bytes_before"]
    text = run("quantize", model, tmp_path / "p", "-c", "int8wo", "--rule", "lm_head=int8wo").stdout
    assert "15 layers quantized, 0 left alone" in text


def test_gptq_sees_a_text(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The sky is blue because the air scatters light. " * 20)
    for algorithm, more in (("mse", ()), ("gptq", ("--calibration", text, "--calibration-tokens", "200"))):
        run("quantize", model, tmp_path / algorithm, "-c", "int3wo-16", "--algorithm", algorithm, *more)
    a, b = (find_source(str(tmp_path / name)).model().model.layers[1].mlp.up_proj.weight for name in ("mse", "gptq"))
    assert a.format == b.format
    assert not torch.equal(a.dequantize(), b.dequantize())
    assert (
        "unknown algorithm 'best'"
        in run("quantize", model, tmp_path / "x", "-c", "int8wo", "-a", "best", code=2).output
    )
    text.write_text("")
    run("quantize", model, tmp_path / "y", "-c", "int8wo", "-a", "gptq", "--calibration", text, code=2)


def test_steps_before_rounding(model, tmp_path):
    """A rotation unties the output projection, also in what is saved."""
    text = tmp_path / "text.txt"
    text.write_text("The sky is blue because the air scatters light. " * 20)
    run("quantize", model, tmp_path / "o", "-c", "int8wo", "-a", "rotation+awq+align", "--calibration", text)
    loaded, original = find_source(str(tmp_path / "o")).model(), find_source(str(model)).model()
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    ids = torch.arange(12).view(1, -1)
    got, wanted = loaded(ids).float(), original(ids).float()
    assert (got - wanted).norm() < 0.2 * wanted.norm()  # 8 bits and bf16; an unrotated projection would be 1.4 away
    assert not torch.allclose(loaded.model.embed_tokens.weight, original.model.embed_tokens.weight)


def test_a_journal_is_gone_on_with(model, tmp_path):
    words = ("--algorithm", "smoothquant", "--calibration-tokens", "64", "--journal", tmp_path / "journal")
    first = document("quantize", model, tmp_path / "a", "-c", "int8wo", *words)
    blocks = sorted((tmp_path / "journal").glob("block-*"))
    assert (first["from_journal"], len(blocks)) == (0, 2)
    blocks[1].unlink()  # as if it had been killed in the second block
    again = document("quantize", model, tmp_path / "b", "-c", "int8wo", *words)
    assert again["from_journal"] == 7
    assert again["layers"] == first["layers"]
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in "ab")
    assert a == b
    said = run("quantize", model, tmp_path / "c", "-c", "int8wo", *words)
    assert "14 layers were in the journal" in said.output
    assert "journal-refused" in run("quantize", model, tmp_path / "d", "-c", "int4wo-32", *words, code=2).output
    assert "bad-option" in run("quantize", model, tmp_path / "d", "-c", "int8wo", *words[2:], code=2).output
    same = run("quantize", model, tmp_path / "d", "-c", "int8wo", *words[:4], "--journal", tmp_path / "d", code=2)
    assert "a directory of its own" in same.output
    assert not (tmp_path / "d").exists()


def test_static_configs_are_calibrated(model, tmp_path):
    run("quantize", model, tmp_path / "o", "-c", "float8sq")
    weight = find_source(str(tmp_path / "o")).model().model.layers[0].mlp.up_proj.weight
    assert weight.act_scale is not None
    assert 0 < float(weight.act_scale) < 1


def test_dtype(model, tmp_path):
    run("quantize", model, tmp_path / "o", "-c", "int8wo", "--dtype", "float16")
    assert find_source(str(tmp_path / "o")).model().model.norm.weight.dtype == torch.float16
    run("generate", tmp_path / "o", "-p", "x", "--dtype", "float16", code=2)


def test_verify_finds_damage(quantized, tmp_path):
    assert document("verify", quantized)["ok"] is True
    assert "ok" in run("verify", quantized).stdout
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in quantized.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    got = document("verify", copy, code=1)
    assert got["ok"] is False
    assert "model.safetensors" in " ".join(got["problems"])
    assert "model.safetensors" in run("verify", copy, code=1).stderr
    run("load", copy, code=2)
    run("generate", copy, "-p", "x", code=2)


def test_load_lists_every_tensor(quantized):
    got = document("load", quantized)
    formats = {t["name"]: t["format"] for t in got["tensors"]}
    assert formats["model.layers.0.mlp.up_proj.weight"] == "int4:g32:asym"
    assert formats["model.norm.weight"] == "bfloat16"
    assert sum(t["quantized"] for t in got["tensors"]) == 14
    assert "14 quantized" in run("load", quantized).stdout


# generate, eval ----------------------------------------------------------------------------------


def test_generate(model, quantized):
    for words in (("generate", model, "--config", "int4wo-32"), ("generate", quantized)):
        shown = run(*words, "--prompt", "the sky", "--max-new-tokens", 5)
        got = document(*words, "--prompt", "the sky", "--max-new-tokens", 5)
        assert shown.stdout == got["text"] + "\n"
        assert "tokens/s" in shown.stderr
        assert got["new_tokens"] == 5
        assert got["prompt_tokens"] == len("the sky") + 1, "the template adds the end token"
    assert document("generate", model, "-p", "the sky", "--raw", "--max-new-tokens", 1)["prompt_tokens"] == 7


def test_draws_follow_the_seed(model):
    words = ("generate", model, "-p", "a", "--temperature", 1.5, "--top-k", 50, "--top-p", 0.95, "--max-new-tokens", 8)
    texts = [document(*words, "--seed", seed)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_character_of_several_tokens_is_shown_when_complete(model, capsys):
    tokenizer = load_tokenizer(model)
    text = Text(tokenizer)
    assert [text.add(token) for token in tokenizer.encode("aä€b")] == ["a", "", "ä", "", "", "€", "b"]
    assert (text.end(), text.text, text.ended) == ("", "aä€b", False)


def test_a_text_ends_in_front_of_a_stop(model):
    """What might become a stop is held back; what then does not, is shown."""
    tokenizer = load_tokenizer(model)
    text = Text(tokenizer, ["abc", "bd"])
    assert [text.add(token) for token in tokenizer.encode("xababdy")] == ["x", "", "", "ab", "", "a", ""]
    assert (text.text, text.ended, text.tokens) == ("xaba", True, 6)
    held = Text(tokenizer, ["abc"])
    assert [held.add(token) for token in tokenizer.encode("xab")] == ["x", "", ""]
    assert (held.end(), held.text, held.ended) == ("ab", "xab", False)
    end = Text(tokenizer)
    assert [end.add(token) for token in (tokenizer.encode("x")[0], tokenizer.eos_ids[0], 5)] == ["x", "", ""]
    assert (end.ended, end.tokens) == (True, 2)


def test_generate_stops(model):
    words = ("generate", model, "-p", "the sky", "--max-new-tokens", 12)
    free = document(*words)
    stop = free["text"][5:7]
    assert (place := free["text"].find(stop)) >= 0
    got = document(*words, "--stop", stop, "--stop", "never said")
    assert got["text"] == free["text"][:place]
    assert got["new_tokens"] < free["new_tokens"]
    assert run(*words, "--stop", stop).stdout == got["text"] + "\n"
    assert "--stop is empty" in run(*words, "--stop", "", code=2).output


def test_generate_takes_several_prompts(model, tmp_path):
    """Each says what it would say alone, in the order in which they were given."""
    file = tmp_path / "prompts.txt"
    file.write_text("the sea\n\nthe skies\n")
    words = ("generate", model, "--max-new-tokens", 6, "--dtype", "float32")
    got = document(*words, "-p", "the sky", "-p", "a", "--prompts", file)
    questions = ["the sky", "a", "the sea", "the skies"]
    assert [t["prompt"] for t in got["texts"]] == questions
    for t in got["texts"]:
        alone = document(*words, "-p", t["prompt"])
        assert {name: alone[name] for name in t} == t
    shown = run(*words, "-p", "the sky", "-p", "a")
    assert shown.stdout == "".join(f"> {t['prompt']}\n{t['text']}\n\n" for t in got["texts"][:2])
    assert f"{8 + 2} prompt tokens" in shown.stderr
    assert "give a --prompt" in run("generate", model, code=2).output


def test_generate_with_a_draft(model, quantized, tmp_path):
    """By config and by MODEL; the text is that of the target."""
    words = ("generate", model, "-p", "the sky", "--max-new-tokens", 20, "--dtype", "float32")
    alone = document(*words)
    assert (alone["draft"], alone["speculation"]) == (None, None)
    for draft in ("int4wo-32", "int8wo", quantized):
        got = document(*words, "--draft", draft, "--draft-tokens", 3)
        assert got["text"] == alone["text"]
        assert got["draft"] == str(draft)
        s = got["speculation"]
        assert s["proposed"] == 3 * s["passes"] > 0
        assert s["acceptance"] == s["accepted"] / s["proposed"]
        assert 1 <= s["tokens_per_pass"] <= 4
    shown = run(*words, "--draft", "int8wo")
    assert shown.stdout == alone["text"] + "\n"
    assert "proposals accepted" in shown.stderr
    assert "quantized twice" in run("generate", quantized, "-p", "x", "--draft", "int4wo-32", code=2).output
    assert "unknown config" in run(*words, "--draft", "int4w", code=2).output


def test_a_terminal_gets_no_commands_from_a_model():
    from lowbit.cli.generate import _visible

    assert _visible("a\x1b[2Jb\r\n\tä€\x9b") == "a\ufffd[2Jb\ufffd\n\tä€\ufffd"


def test_eval_compares_with_the_original(model, quantized):
    got = document("eval", model, "-c", "int8wo", "-c", "int4wo-32", *SMALL)["results"]
    assert [r["config"] for r in got] == ["bfloat16", "int8wo", "int4wo-32"]
    assert got[0]["kl_mean"] == pytest.approx(0, abs=1e-5)
    assert 0 < got[1]["kl_mean"] < got[2]["kl_mean"]
    assert got[0]["bytes"] > got[1]["bytes"] > got[2]["bytes"]
    other = document("eval", quantized, "--original", model, *SMALL)["results"]
    assert [r["config"] for r in other] == ["original", "quantized"]
    assert other[1]["kl_mean"] == got[2]["kl_mean"]
    alone = document("eval", quantized, *SMALL)["results"]
    assert alone[0]["perplexity"] == got[2]["perplexity"]
    assert alone[0]["kl_mean"] is None


def test_eval_prints_a_table_and_takes_a_text(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the sky is blue " * 20, encoding="utf-8")
    shown = run("eval", model, "-c", "int8wo", "--text", text, *SMALL).stdout
    assert "int8wo" in shown
    assert "perplexity" in shown
    plain = document("eval", model, *SMALL)["results"][0]["perplexity"]
    assert document("eval", model, "--text", text, *SMALL)["results"][0]["perplexity"] != plain


def test_eval_shows_what_models_answer(model, monkeypatch):
    """Without lm-eval, which needs not be installed: its part is in tests/tools/test_tasks.py."""
    asked = []

    def answers(model, tokenizer, tasks, folder, limit):
        asked.append((tasks, folder, limit))
        return [TaskResult("sums", 4, {"acc": 0.5}, {"acc": 0.25}, (0, 1, 2, len(asked)))]

    monkeypatch.setattr("lowbit.cli.evaluate.run_tasks", answers)
    words = ("eval", model, "-c", "int8wo", "--tasks", "sums,words", "--task-limit", "4", *SMALL)
    got = document(*words)["tasks"]
    assert asked == [(["sums", "words"], None, 4)] * 2
    assert [(r["config"], r["metrics"]["acc"], r["agreement"]) for r in got] == [
        ("bfloat16", 0.5, None), ("int8wo", 0.5, 0.75),
    ]  # fmt: skip
    shown = run(*words).stdout
    assert "50.0 +- 25.0" in shown
    assert "75.0" in shown


# inspect, explain, warmup, doctor, demo ----------------------------------------------------------


def test_inspect(model, quantized):
    got = document("inspect", model, "-c", "int8wo", "-c", "int4wo-32")["layers"]
    layer = next(x for x in got if x["name"] == "model.layers.0.mlp.up_proj")
    assert set(layer["sqnr_db"]) == {"int8wo", "int4wo-32"}
    assert layer["sqnr_db"]["int8wo"] > layer["sqnr_db"]["int4wo-32"] + 15
    packed = document("inspect", quantized)["layers"]
    assert {x["format"] for x in packed if "format" in x} == {"int4:g32:asym"}
    assert "codes used" in run("inspect", quantized).stdout
    assert "kurtosis" in run("inspect", model, "-c", "int8wo").stdout


def test_explain(model, quantized):
    got = document("explain", model, "--config", "int4wo-32")["explanation"]
    assert len(got["layers"]) == 14
    assert got == document("explain", quantized)["explanation"]
    assert "kernels on cpu" in run("explain", quantized).stdout


def test_warmup(model, quantized):
    got = document("warmup", model, "--config", "int4wo-32", "--tokens", "4,1, 2,1")["warmup"]
    assert got["devices"] == ["cpu"]
    assert [name.rpartition(".")[2] for name in got["layers"]] == ["q_proj", "k_proj", "gate_proj", "down_proj"]
    assert sorted(m for tokens in got["kernels"].values() for m in tokens) == [1, 2, 4]
    again = document("warmup", quantized, "-m", "1,2,4")["warmup"]
    assert again | {"seconds": 0} == got | {"seconds": 0}
    assert "warm on cpu: 4 kinds of layers" in run("warmup", quantized, "--tokens", 1).stdout


def test_doctor_lists_every_config():
    got = document("doctor", "--device", "cpu")
    assert [c["config"] for c in got["configs"]] == list(EXAMPLES)
    shown = run("doctor", "--device", "cpu").stdout
    assert all(spec in shown for spec in EXAMPLES)
    assert f"all {len(EXAMPLES)} configs run here" in shown


def test_demo(model, tmp_path, monkeypatch):
    from lowbit.cli import machine
    from lowbit.tools.demo import DemoPlan

    plan = DemoPlan(("int8wo", "int3wo-64"), tokens=100, window=50, new_tokens=5)
    monkeypatch.setattr(machine, "QUICK", plan)
    out = tmp_path / "deep" / "report.html"
    shown = run("demo", "--quick", "--model", model, "--out", out).stdout
    assert all(word in shown for word in ("bf16", "int8wo", "int3wo-64", str(out)))
    assert "grid" not in shown, "a note about the demo's own model"
    data = json.loads(out.with_suffix(".json").read_text())
    assert [r["config"] for r in data["rows"]] == ["bf16", *plan.configs]
    assert out.read_text().startswith("<!doctype html>")
    got = document("demo", "--quick", "--model", model, "--out", out)
    assert [r["config"] for r in got["rows"]] == ["bf16", *plan.configs]


def test_the_demo_says_what_its_own_model_flatters(model, tmp_path, monkeypatch):
    from lowbit.cli import machine
    from lowbit.tools.demo import DemoPlan
    from lowbit.tools.sources import Source

    monkeypatch.setattr(machine, "FULL", DemoPlan(("int8wo",), tokens=60, window=60, new_tokens=2))
    monkeypatch.setattr(machine, "find_source", lambda name: Source(name, model, "huggingface"))
    out = tmp_path / "r.html"
    assert "4-bit grid" in " ".join(run("demo", "--out", out).stdout.split())
    assert "4-bit grid" in out.read_text()


# bench -------------------------------------------------------------------------------------------

BENCH = ("bench", "linear", "--device", "cpu", "--peers", "none")


def test_bench_linear(tmp_path, monkeypatch):
    from lowbit.tools import timing
    from lowbit.tools.bench_rows import read_rows

    monkeypatch.setattr(timing, "MOST_COPIES", 3)
    out, plot = tmp_path / "deep" / "linear.json", tmp_path / "linear.svg"
    words = (*BENCH, "-l", "64x256,96x128", "-f", "int4:g128", "-f", "int8dq", "-m", "1,3")
    shown = run(*words, "--out", out, "--plot", plot).stdout
    lines = [line.split() for line in shown.splitlines() if line.startswith(("64x256", "96x128"))]
    assert [line[:3] for line in lines] == [
        [layer, scheme, m] for layer in ("64x256", "96x128") for scheme in ("int4:g128", "int8:row+int8:row")
        for m in "13"
    ]  # fmt: skip
    assert "64x256" in plot.read_text()
    saved = json.loads(out.read_text())
    assert saved["left_out"] == saved["not_installed"] == []
    assert saved["torch"] == torch.__version__
    assert len(read_rows(out)) == 8
    got = document(*words)
    assert [r["provider"] for r in got["records"]] == ["bf16", "lowbit"] * 8
    assert set(got) == set(saved)


def test_bench_says_what_it_left_out(tmp_path):
    out = tmp_path / "linear.json"
    result = run(*BENCH, "-l", "64x256", "-f", "int4:g128", "-m", "1,2", "--seconds", -1, "--out", out)
    assert result.stderr.splitlines() == [f"left out, -1 s are spent: 64x256 int4:g128 M = {m}" for m in (1, 2)]
    assert [x["m"] for x in json.loads(out.read_text())["left_out"]] == [1, 2]


def test_bench_fails_where_lowbit_is_wrong(monkeypatch):
    """A row whose result misses the accuracy of its format is no success, however fast."""
    from lowbit.tools import bench_linear, timing

    monkeypatch.setattr(timing, "MOST_COPIES", 3)
    monkeypatch.setattr(bench_linear, "sqnr_db", lambda exact, got: 20.0)
    shown = run(*BENCH, "-l", "64x256", "-f", "int8:row", "-m", "1", code=1).stdout
    assert "20.0 dB, int8:row allows no less than 46.0 dB" in shown


GENERATE = ("bench", "generate", "--model", "tiny", "--device", "cpu", "-n", "3")


def test_bench_generate(tmp_path):
    out, plot = tmp_path / "deep" / "generate.json", tmp_path / "generate.svg"
    words = (*GENERATE, "-c", "int4wo-128,bf16", "-c", "int8dq", "-b", "1,2", "-p", "5")
    shown = run(*words, "--out", out, "--plot", plot)
    lines = [line.split()[:3] for line in shown.stdout.splitlines() if line.startswith(("bf16", "int"))]
    assert lines == [[config, batch, "5"] for config in ("bf16", "int4wo-128", "int8dq") for batch in "12"]
    assert "tiny in int8dq: making weights ..." in shown.stderr
    saved = json.loads(out.read_text())
    assert saved["left_out"] == []
    assert [(r["config"], r["batch"]) for r in saved["records"]] == [(c, int(b)) for c, b, _ in lines]
    assert {"date", "gpu", "torch", "triton", "command"} <= set(saved)
    assert "int4wo-128, batch 2, prompt 5" in plot.read_text()
    assert set(document(*GENERATE, "-c", ",")) == set(saved)


def test_bench_generate_fails_where_a_config_does_not_run(monkeypatch, tmp_path):
    """The other rows stand, and are in the file."""
    from lowbit.tools import bench_generate

    made = bench_generate.random_model

    def broken(config, scheme, device):
        if scheme is not None and scheme.act is not None:
            raise RuntimeError("out of luck")
        return made(config, scheme, device)

    monkeypatch.setattr(bench_generate, "random_model", broken)
    out = tmp_path / "generate.json"
    shown = run(*GENERATE, "-c", "int8dq,int8wo", "-p", "4", "--out", out, code=1).stdout
    assert "RuntimeError: out of luck" in shown
    records = json.loads(out.read_text())["records"]
    assert [(r["config"], r["error"], r["step_us"] is None) for r in records] == [
        ("bf16", "", False), ("int8dq", "RuntimeError: out of luck", True), ("int8wo", "", False)
    ]  # fmt: skip


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("quantize", "MODEL", "OUT"), "--config"),
        (("quantize", "MODEL", "OUT", "-c", "int9wo"), "unknown config"),
        (("quantize", "MODEL", "OUT", "-c", "int8wo", "-r", "down_proj"), "NAME=CONFIG"),
        (("quantize", "MODEL", "OUT", "-c", "int8wo", "-r", "nothing=int8wo"), "match no layer"),
        (("quantize", "MODEL", "OUT", "-c", "int8wo", "--dtype", "int8"), "--dtype"),
        (("quantize", "QUANTIZED", "OUT", "-c", "int8wo"), "quantized already"),
        (("quantize", "nowhere", "OUT", "-c", "int8wo"), "does not exist"),
        (("inspect", "EMPTY"), "is none of these"),
        (("verify", "nowhere"), "nowhere"),
        (("load", "EMPTY"), "EMPTY"),
        (("generate", "MODEL", "-p", "x", "--temperature", "-1"), "temperature"),
        (("generate", "MODEL", "-p", "x", "--max-new-tokens", "100000"), "context"),
        (("eval", "MODEL", "--tokens", "1"), "--tokens"),
        (("eval", "MODEL", "--text", "nowhere.txt"), "nowhere.txt"),
        (("eval", "MODEL", "--original", "MODEL"), "--original"),
        (("explain", "MODEL"), "--config"),
        (("explain", "QUANTIZED", "-c", "int8wo"), "quantized already"),
        (("warmup", "MODEL"), "--config"),
        (("warmup", "QUANTIZED", "--tokens", "1,0"), "--tokens"),
        (("warmup", "QUANTIZED", "--tokens", "1,two"), "--tokens"),
        (("warmup", "QUANTIZED", "--tokens", ""), "--tokens"),
        (("demo", "--model", "QUANTIZED"), "quantized already"),
        ((*BENCH, "-l", "up"), "NxK"),
        ((*BENCH, "-f", "int9"), "unknown config"),
        ((*BENCH, "-f", "float8sq"), "static"),
        ((*BENCH, "-m", "0"), "--tokens"),
        ((*BENCH, "-m", ","), "at least one"),
        ((*BENCH, "--plot", "OUT"), "--plot"),
        (("bench", "linear", "--peers", "cutlass"), "known are torchao"),
        (("bench", "generate", "--model", "gpt-5"), "unknown shape 'gpt-5'"),
        ((*GENERATE, "-c", "int9"), "unknown config"),
        ((*GENERATE, "-b", "0"), "--batch 0"),
        ((*GENERATE, "-p", "x"), "--prompt x"),
        ((*GENERATE, "-p", "2000"), "make up to 2004 tokens, tiny has a context of 1024"),
        ((*GENERATE, "--plot", "OUT"), "--plot"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_code_2(words, message, model, quantized, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"MODEL": model, "QUANTIZED": quantized, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty"}
    words = [places.get(w, w) for w in words]
    message = str(places.get(message, message))
    result = run(*words, code=2)
    shown = " ".join(result.stderr.split())
    assert shown.startswith("error: ")
    assert message in shown.replace(" ", "") or message in shown
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()
    assert message in document(*words, code=2)["error"]


def test_what_fails_while_running_is_code_1(monkeypatch, model):
    from lowbit.tools import sources

    def offline() -> Path:
        raise RuntimeError("could not download it")

    monkeypatch.setattr(sources, "demo_model", offline)
    assert "could not download it" in run("inspect", "demo", code=1).stderr


def test_debug_shows_where(model, tmp_path):
    with pytest.raises(ValueError, match="unknown config"):
        CliRunner().invoke(app, ["quantize", str(model), str(tmp_path), "-c", "x", "--debug"], catch_exceptions=False)


def test_usage_errors_are_code_2():
    for words in (("quantize",), ("nonsense",), ("doctor", "--nonsense")):
        run(*words, code=2)


def test_every_command_has_help():
    shown = run("--help").stdout
    for name in COMMANDS:
        assert name.split()[0] in shown
        assert run(*name.split(), "--help").stdout.count("--json") == 1
    assert lowbit.__version__ in run("--version").stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_missing_packages_are_named_with_the_pip_command(missing):
    hide = (
        "import importlib.util as u, sys; real = u.find_spec; "
        f"u.find_spec = lambda n, *a: None if n == {missing!r} else real(n, *a); "
        "from lowbit.cli import main; main()"
    )
    path = str(Path(lowbit.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", hide], capture_output=True, text=True, env={"PYTHONPATH": path}, timeout=120
    )
    assert done.returncode == 2
    assert missing in done.stderr
    assert "pip install 'lowbit[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


# A GGUF file's configuration and tokenizer as files of a directory -------------------------------


def test_configuration_survives(model):
    from dataclasses import replace

    from lowbit.models import LlamaConfig

    kinds = [
        CONFIG, replace(CONFIG, qkv_bias=True), replace(CONFIG, qkv_bias=True, o_bias=True),
        replace(CONFIG, qk_norm=True), replace(CONFIG, rope_divisors=(4.0,) * 8), replace(CONFIG, mlp_bias=True),
    ]  # fmt: skip
    for config in kinds:
        assert LlamaConfig.from_huggingface(huggingface_config(config, (0,))) == config
    with pytest.raises(ValueError, match="its own factor"):
        huggingface_config(replace(CONFIG, rope_divisors=(1.0, 2.0)))


@pytest.mark.parametrize("bos", [None, 3])
def test_a_tokenizer_survives(model, tmp_path, bos):
    from dataclasses import replace

    tokenizer = replace(load_tokenizer(model), bos_id=bos, special={"eos_token": "<|end|>"})
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode("the sky, ä") == tokenizer.encode("the sky, ä")
    assert again.decode(again.encode("the sky")) == tokenizer.decode(tokenizer.encode("the sky"))
    assert again.eos_ids == tokenizer.eos_ids
    assert again.chat_template == tokenizer.chat_template


def test_rules_are_parsed():
    assert parse_rules(["a=int8wo", "re:x=y.*=none"]) == {"a": "int8wo", "re:x=y.*": None}
