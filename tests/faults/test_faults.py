"""A few faults of every kind; benchmarks/faults.py has the full figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults.catalogue import FAULTS, Fault
from faults.golden import GOLDEN, schemes
from faults.parsers import PARSERS, complaint, seeds
from lowbit import __version__


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name.replace(" ", "-"))
def test_promise_is_kept(fault: Fault, tmp_path: Path) -> None:
    if fault.needs is not None:
        pytest.importorskip(fault.needs)
    outcome = fault.run(fault.few, tmp_path)
    assert outcome.cases > 0
    assert outcome.held == outcome.cases, "\n".join(outcome.failures)
    assert not outcome.failures


def test_every_scheme_has_golden_files() -> None:
    """`python tests/faults/golden.py` writes those of a new one."""
    assert {p.name for p in (GOLDEN / __version__).iterdir() if p.is_dir()} == set(schemes())


SEEDS = seeds()


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_parsers_refuse_or_read(name: str, data: st.DataObject) -> None:
    """Pieces of what a parser knows, in any order, with anything between them."""
    known = data.draw(st.sampled_from(SEEDS[name]))
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, min(len(known), 2000))] * 2)))
    between = data.draw(st.one_of(st.binary(max_size=40), st.text(max_size=20).map(lambda t: t.encode())))
    assert complaint(name, known[:a] + between + known[b:]) is None
