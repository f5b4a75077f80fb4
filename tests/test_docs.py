"""Every example of the documentation is run, every link followed, every table compared with the registries.

Marks are HTML comments on the line before a fenced block:

    <!-- raises ValueError -->       the python block ends with this error
    <!-- prints -->                  the text block is what the python blocks above it printed (`...` matches anything)
    <!-- run: torchrun -->           the python block is a program for two processes
    <!-- needs: transformers -->     the python block is run where that package is installed, else the page ends there
    <!-- not run: why -->            not executed; commands are still checked against the command line's own help
"""

from __future__ import annotations

import ast
import builtins
import doctest
import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import docs_tables
import pytest
import tokenizers
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

import lowbit
from lowbit.checkpoint import CheckpointError
from lowbit.cli.app import app
from lowbit.errors import PAGES
from lowbit.formats import registered
from lowbit.formats.base import families, unregister
from lowbit.kernels.select import KERNELS
from lowbit.models import Llama, LlamaConfig
from lowbit.tools.sources import huggingface_config

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
EVERY_PAGE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
EVERY_PAGE += sorted(DOCS.rglob("*.md"))
ERROR_PAGES = sorted((DOCS / "errors").glob("*.md"))
OTHER_PAGES = [p for p in EVERY_PAGE if p not in ERROR_PAGES]
each_page = pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda p: str(p.relative_to(ROOT)))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, text, first line's number, and the mark before it."""

    language: str
    text: str
    line: int
    mark: str

    @property
    def not_run(self) -> bool:
        return self.mark.startswith("not run: ")


def blocks(page: Path) -> list[Block]:
    out: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    i = 0
    while i < len(lines):
        fence = re.fullmatch(r"```(\w*)", lines[i])
        if fence:
            end = lines.index("```", i + 1)
            mark = re.fullmatch(r"<!-- (.*) -->", lines[i - 1]) if i else None
            out.append(Block(fence[1], "\n".join(lines[i + 1 : end]) + "\n", i + 2, mark[1] if mark else ""))
            i = end
        i += 1
    return out


# Python ------------------------------------------------------------------------------------------


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A module of its own in an empty directory; formats that the page registers are forgotten afterwards."""
    module = types.ModuleType("documentation_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    before = set(families())
    yield module.__dict__
    unregister(*(set(families()) - before))


def execute(page: Path, block: Block, names: dict[str, object]) -> None:
    # Empty lines in front: a traceback shows the page's own line numbers.
    tree = ast.parse("\n" * (block.line - 1) + block.text, filename=str(page))
    exec(compile(tree, str(page), "exec", dont_inherit=True), names)


def error_type(block: Block) -> type[Exception]:
    name = block.mark.removeprefix("raises ")
    ours = {"UnsupportedError": lowbit.UnsupportedError, "CheckpointError": CheckpointError}
    return ours[name] if name in ours else getattr(builtins, name)


def run_program(block: Block, directory: Path) -> str:
    program = directory / "program.py"
    program.write_text(block.text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)

    done = run()
    if "terminate called without an active exception" in done.stderr:
        # Seen once in dozens of runs: at exit, after the last line, a thread of torch's gloo backend was still there.
        done = run()
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "page", [p for p in EVERY_PAGE if p not in ERROR_PAGES], ids=lambda p: str(p.relative_to(ROOT))
)
def test_python_examples_run(
    page: Path, namespace: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = ""
    for block in blocks(page):
        if block.mark.startswith("needs: "):
            pytest.importorskip(block.mark.removeprefix("needs: "))
        if block.language == "python" and not block.not_run:
            if block.mark.startswith("raises "):
                with pytest.raises(error_type(block)):
                    execute(page, block, namespace)
            elif block.mark == "run: torchrun":
                printed += run_program(block, tmp_path)
            else:
                execute(page, block, namespace)
            printed += capsys.readouterr().out
        elif block.mark == "prints":
            matches = doctest.OutputChecker().check_output(block.text, printed, doctest.ELLIPSIS)
            assert matches, f"{page}:{block.line} shows\n{block.text}but the examples print\n{printed}"
            printed = ""


def test_marks_are_known() -> None:
    known = re.compile(r"raises \w+|prints|run: torchrun|needs: \w+|not run: .{10,}|table \w+: .*|")
    for page in EVERY_PAGE:
        for block in blocks(page):
            assert known.fullmatch(block.mark), f"{page}:{block.line}: mark {block.mark!r}"
            assert block.language in ("python", "console", "text", "toml"), f"{page}:{block.line}: {block.language!r}"


# Commands ----------------------------------------------------------------------------------------


def write_model(directory: Path) -> None:
    """A tiny random model whose tokens are bytes, in a Hugging Face directory: what MODEL is in the examples."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16,
        max_positions=128, norm_eps=1e-5, rope_theta=10000.0,
    )  # fmt: skip
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(huggingface_config(config)))
    save_file(Llama(config).bfloat16().state_dict(), directory / "model.safetensors")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(directory / "tokenizer.json"))


def check_names(words: list[str]) -> None:
    """A command that is not run: the subcommand exists, and so does every option."""
    command = typer.main.get_command(app)
    for name in words:
        if not hasattr(command, "commands"):
            break
        assert name in command.commands, words
        command = command.commands[name]
    options = {o for p in command.params for o in p.opts}
    assert {w for w in words if re.match("--?[a-z]", w)} <= options, words


@pytest.mark.parametrize("page", OTHER_PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_work(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    consoles = [b for b in blocks(page) if b.language == "console"]
    if any(not b.not_run for b in consoles):
        write_model(tmp_path / "model")
    for block in consoles:
        lines = [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
        assert lines, f"{page}:{block.line}: a command begins with '$ '"
        for line in lines:
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
                assert all(re.search(rf"^{w}:", makefile, re.M) for w in words[1:]), line
            if words[0] != "lowbit":
                assert block.not_run, f"{page}:{block.line}: only lowbit commands are run: {line}"
            elif block.not_run:
                check_names(words[1:])
            else:
                done = CliRunner().invoke(app, words[1:])
                assert done.exit_code == 0, f"{page}:{block.line}: {line}\n{done.output}"


# Links and tables --------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page}: {target} does not exist"
        assert not anchor or anchor in anchors(file), f"{page}: {target}: {file.name} has no such heading"


@pytest.mark.parametrize("name", docs_tables.TABLES)
def test_tables_say_what_registries_and_results_say(name: str) -> None:
    table = docs_tables.TABLES[name]
    shown = docs_tables.section(name, (ROOT / table.page).read_text(encoding="utf-8")).group()
    assert shown == table.render(), "run: python tests/docs_tables.py"


def tables(page: Path) -> Iterator[dict[str, str]]:
    """The rows of every Markdown table of a page, each as column to cell."""
    header: list[str] = []
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            header = []
            continue
        cells = [c.strip() for c in line.strip("|").split("|")]
        if not header:
            header = cells
        elif not set(line) <= set("|-: "):
            yield dict(zip(header, cells, strict=True))


@each_page
def test_rows_about_formats_and_configs_are_right(page: Path) -> None:
    for row in tables(page):
        if "spec" in row and "bits per weight" in row:
            assert row["bits per weight"] == f"{lowbit.parse_format(row['spec'].strip('`')).bits_per_weight:.4g}", row
        if "short name" in row and "config" in row:
            assert type(lowbit.parse_config(row["short name"].strip("`"))).__name__ == row["config"].strip("`"), row


def test_readme_shows_every_family() -> None:
    shown = {row["spec"].strip("`").split(":")[0] for row in tables(ROOT / "README.md") if "spec" in row}
    classes = {type(f) for f in registered()}
    assert {type(lowbit.parse_format(s)) for s in shown} == classes


def test_kernels_page_has_the_table_of_kernels() -> None:
    shown = [row["kernel"].strip("`") for row in tables(DOCS / "kernels.md") if "kernel" in row]
    assert shown == [kernel.name for kernel in KERNELS]


def test_every_benchmark_is_described() -> None:
    shown = {row["program"].strip("`") for row in tables(ROOT / "benchmarks" / "README.md")}
    assert shown == {p.name for p in (ROOT / "benchmarks").glob("*.py")}


# Errors ------------------------------------------------------------------------------------------


def test_every_error_has_a_page_and_every_page_an_error() -> None:
    assert {p.stem for p in ERROR_PAGES} == set(PAGES)


def test_codes_of_errors_are_their_own() -> None:
    codes = [page.code for page in PAGES.values()]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"LB[1-4]\d{3}", code) for code in codes)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_error_is_raised_by_the_source(name: str) -> None:
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "src" / "lowbit").rglob("*.py")]
    assert any(re.search(rf'\bsee\(\s*"{name}"', s) for s in sources)


@pytest.mark.parametrize("page", ERROR_PAGES, ids=lambda p: p.stem)
def test_error_page_explains_and_shows_its_error(page: Path, namespace: dict[str, object]) -> None:
    text = page.read_text(encoding="utf-8")
    code, line = PAGES[page.stem]
    assert text.startswith(f"# {page.stem} ({code})\n\n{line}\n"), "the page opens with its name, code and line"
    assert "\n## Why\n" in text
    assert "\n## What to do\n" in text
    raising = 0
    for block in blocks(page):
        if block.mark.startswith("raises "):
            raising += 1
            with pytest.raises(error_type(block)) as caught:
                execute(page, block, namespace)
            assert str(caught.value).endswith(f" ({code}) [lowbit: {page.stem}]"), str(caught.value)
        elif block.language == "python":
            execute(page, block, namespace)
    assert raising, "no block is marked <!-- raises ... -->"
