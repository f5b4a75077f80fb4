"""The commands. Each one opens its input, calls one tool and prints what it says."""

from __future__ import annotations

import typer

from lowbit.cli import evaluate, generate, machine, weights
from lowbit.cli.autoquant import autoquant
from lowbit.cli.bench import bench
from lowbit.cli.bench_generate import generate as _  # noqa: F401 (adds its command to bench)
from lowbit.cli.profile import profile
from lowbit.cli.roofline import roofline

app = typer.Typer(
    name="lowbit",
    help="Quantize language models, prove what it costs, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        from lowbit import __version__

        typer.echo(f"lowbit {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Quantize language models, prove what it costs, and run them.

    MODEL is a Hugging Face directory, a .gguf file, a directory that `lowbit quantize` wrote, or the word demo.
    Exit codes: 0 ok, 1 what was asked for failed, 2 bad input, 3 what --fail-on names was found.
    """


for function in (
    machine.demo, weights.quantize, weights.verify, weights.load, generate.generate, evaluate.eval_, weights.inspect,
    weights.explain, weights.warmup, autoquant, profile, roofline, machine.doctor,
):  # fmt: skip
    app.command(function.__name__.rstrip("_"))(function)
app.add_typer(bench, name="bench")
