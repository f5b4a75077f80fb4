"""Adding a format touches one class: a toy one is registered, and every registry-driven test takes it up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit
from lowbit.formats import parse_format, register, registered
from lowbit.formats.base import unregister
from lowbit.formats.fp8 import Float8Format

TESTS = Path(__file__).parent


def test_the_whole_suite_takes_it_up() -> None:
    paths = [str(Path(lowbit.__file__).parents[1]), str(TESTS), str(TESTS / "formats")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "toy_format", "-p", "no:xdist", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "-m", "not gpu", "-k", "ternary", str(TESTS), f"--ignore={__file__}"],
        env=env, cwd=TESTS.parent, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= 50, run.stdout[-2000:]


def test_names_are_taken_once_and_given_back() -> None:
    before = registered()
    with pytest.raises(ValueError, match="'float8_e4m3' is taken"):
        register("float8_e4m3")(Float8Format)

    class Again(Float8Format):
        examples = ("float8_again",)

        @classmethod
        def from_spec(cls, name: str, *options: str) -> Again:
            return cls()

    register("float8_again")(Again)
    try:
        assert isinstance(parse_format("float8_again"), Again)
        assert len(registered()) == len(before) + 1
    finally:
        unregister("float8_again")
    assert registered() == before
    with pytest.raises(ValueError, match=r"unknown format 'float8_again'; families: .*nvfp4"):
        parse_format("float8_again")
