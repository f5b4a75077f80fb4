"""The import rules, read from the source: every layer of lowbit imports only what lies below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "lowbit"
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {".".join(("lowbit", *f.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): f for f in FILES}

# What lies below each layer. A name also stands for everything inside it; a layer may import from itself.
BASE = ("lowbit.granularity", "lowbit.errors", "lowbit.cache")
BELOW: dict[str, tuple[str, ...]] = {
    "lowbit.granularity": ("lowbit.errors",),
    "lowbit.errors": (),
    "lowbit.cache": ("lowbit.errors",),
    "lowbit.formats": BASE,
    "lowbit.algorithms": ("lowbit.formats", *BASE),
    "lowbit.kernels": ("lowbit.formats", *BASE),
    "lowbit.ops": ("lowbit.kernels", "lowbit.formats", *BASE),
    "lowbit.decoder_ops": ("lowbit.kernels", *BASE),
    "lowbit.operand_ops": ("lowbit.decoder_ops", "lowbit.kernels", "lowbit.formats", *BASE),
    "lowbit.tensor": ("lowbit.ops", "lowbit.formats", *BASE),
    "lowbit.dispatch": ("lowbit.tensor", "lowbit.ops", "lowbit.formats", *BASE),
}
MIDDLE = ("lowbit.quantize", "lowbit.calibrate", "lowbit.checkpoint", "lowbit.checkpoints", "lowbit.configs",
          "lowbit.specs", "lowbit.report", "lowbit.original", "lowbit.explain", "lowbit.warmup",
          "lowbit.models", "lowbit.attention", "lowbit.graph", "lowbit.fold", "lowbit.recipe", "lowbit.stages",
          "lowbit.rules", "lowbit.qat", "lowbit.tune", "lowbit.tune_blocks", "lowbit.journal",
          "lowbit.resume", "lowbit.linear", "lowbit.quantize_layer")  # fmt: skip
TOP = ("lowbit.tools", "lowbit.testing", "lowbit.integrations", "lowbit.cli", "lowbit.__main__")
# What `pip install lowbit` does not bring.
EXTRAS = {"triton", "typer", "rich", "tqdm", "jinja2", "matplotlib", "tokenizers", "gguf", "transformers", "torchao",
          "vllm", "sglang", "diffusers", "pandas", "scipy", "cuda", "cupy"}  # fmt: skip


def within(module: str, layer: str) -> bool:
    return module == layer or module.startswith(layer + ".")


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Modules that a file imports; of lowbit's own names, the module that defines them."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if top_level_only:
        inner = {n for f in nodes if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
        checking = {n for i in nodes if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
                    for n in ast.walk(i)}  # fmt: skip
        nodes = [n for n in nodes if n not in inner and n not in checking]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module or "")
    return found


def module_of(path: Path) -> str:
    return next(name for name, file in MODULES.items() if file == path)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    module = module_of(path)
    own = [name for name in imports(path) if within(name, "lowbit")]
    layer = next((name for name in BELOW if within(module, name)), None)
    if layer is not None:
        for name in own:
            allowed = (layer, *BELOW[layer])
            assert any(within(name, a) for a in allowed), f"{module} imports {name}; it may import {allowed}"
    elif any(within(module, m) for m in MIDDLE):
        for name in own:
            assert not any(within(name, t) for t in TOP), f"{module} imports {name}, which lies above it"
    elif module != "lowbit":
        assert any(within(module, t) for t in TOP), f"{module} belongs to no layer of {Path(__file__).name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_extras_are_imported_late(path: Path) -> None:
    """At the top of a file only where the whole file is about the extra: GPU kernels and the command line."""
    module = module_of(path)
    if any(within(module, t) for t in ("lowbit.kernels.triton", "lowbit.kernels.cuda", *TOP)):
        return
    early = {name.split(".")[0] for name in imports(path, top_level_only=True)} & EXTRAS
    assert not early, f"{module} imports {sorted(early)} when it is imported"


def test_only_ops_and_kernels_meet_kernels() -> None:
    """Formats know no kernel, and what lies above `ops` reaches kernels only to ask which one runs.

    What ranks exchange is no op, since an op takes no process group, but stands where one would.
    """
    for name, path in MODULES.items():
        if (
            within(name, "lowbit.kernels")
            or name in ("lowbit.ops", "lowbit.decoder_ops", "lowbit.operand_ops", "lowbit.models.ranks", "lowbit")
            or any(within(name, t) for t in TOP)
        ):
            continue
        used = {m for m in imports(path) if within(m, "lowbit.kernels")}
        assert used <= {"lowbit.kernels.select", "lowbit.kernels.problem"}, f"{name} imports {used}"


def test_there_are_no_cycles() -> None:
    """Following imports at the top of files never comes back."""
    edges = {
        name: {m for m in imports(path, top_level_only=True) if m in MODULES and m != name}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_house_rules(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert path.name not in ("utils.py", "common.py", "helpers.py")
    assert ast.get_docstring(tree) or not text.strip(), "a file says what it is about"
    assert len(text.splitlines()) <= 520, "a file above about 400 lines asks for a design"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.save", "pickle.load", "pickle.loads", "eval", "exec"), called
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except hides faults"
