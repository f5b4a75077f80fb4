"""Faults of every kind, brought about on purpose and counted.

Each file has one kind of fault and a function `run(cases, directory) -> Outcome` that does what its name says so many
times. `catalogue.py` lists them. `test_faults.py` runs few cases of each in CI, `benchmarks/faults.py` all of them for
docs/reliability.md.
"""
