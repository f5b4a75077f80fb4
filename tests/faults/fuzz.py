"""Feeds the parsers of `parsers.py` for as long as one likes.

    python tests/faults/fuzz.py SECONDS                            changes of what they know, in turn
    python tests/faults/fuzz.py --atheris NAME CORPUS [options]    one of them led by coverage; needs `lowbit[fuzz]`

CORPUS is a directory in which inputs that reach new code are kept, to go on with. Options are those of libFuzzer, such
as -max_total_time=60. An input that makes a parser raise what it must not stops the run and is printed.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def by_turns(seconds: float) -> int:
    from faults.parsers import changed, complaint, seeds

    rng, stop, done = random.Random(time.time_ns()), time.monotonic() + seconds, 0
    pools = {name: list(known) for name, known in seeds().items()}
    while time.monotonic() < stop:
        for name, pool in pools.items():
            data = changed(rng, rng.choice(pool))
            done += 1
            if wrong := complaint(name, data):
                print(wrong)
                return 1
            if rng.random() < 0.05 and len(pool) < 5000:
                pool.append(data)
    print(f"{done} inputs, nothing but refusals")
    return 0


def by_coverage(name: str, corpus: Path, options: list[str]) -> int:
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["lowbit"]):
        from faults.parsers import complaint, seeds

    corpus.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(seeds()[name]):
        (corpus / str(i)).write_bytes(data)

    def once(data: bytes) -> None:
        wrong = complaint(name, data)
        assert wrong is None, wrong

    atheris.Setup([sys.argv[0], *options, str(corpus)], once)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS / "formats"), str(TESTS.parent / "src")]
    if sys.argv[1] == "--atheris":
        raise SystemExit(by_coverage(sys.argv[2], Path(sys.argv[3]), sys.argv[4:]))
    raise SystemExit(by_turns(float(sys.argv[1])))
