"""Brings about every kind of fault as often as docs/reliability.md says, and counts how often a promise was kept.

    python benchmarks/faults.py --out benchmarks/results/NAME.json [--only NAME,NAME] [--share 0.1]

The faults are those of tests/faults/, which needs the packages of `lowbit[test]`, and of `lowbit[fuzz]` for one of
them. It ends with an error if any promise was broken.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "formats")]

from faults.catalogue import FAULTS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="names of faults, separated by commas")
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of cases")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = args.only.split(",") if args.only else [fault.name for fault in FAULTS]
    if unknown := set(chosen) - {fault.name for fault in FAULTS}:
        parser.error(f"no faults {sorted(unknown)}; there are {', '.join(fault.name for fault in FAULTS)}")
    rows, kept = [], True
    for fault in FAULTS:
        if fault.name not in chosen:
            continue
        if fault.needs is not None and importlib.util.find_spec(fault.needs) is None:
            print(f"{fault.name:18} left out: {fault.needs} is not installed", flush=True)
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            outcome = fault.run(max(1, round(fault.full * args.share)), Path(folder))
        seconds = time.perf_counter() - started
        kept &= outcome.held == outcome.cases and not outcome.failures
        print(f"{fault.name:18} {outcome.held} of {outcome.cases}, {seconds:.0f} s, {dict(outcome.counts)}", flush=True)
        print("".join(f"    {failure}\n" for failure in outcome.failures), end="")
        said = {"fault": fault.happens, "promise": fault.promise, "file": fault.file}
        rows.append({"name": fault.name, **said, "seconds": round(seconds, 1), **outcome.to_json()})
    if args.out:
        info = {
            "command": "python " + " ".join(sys.argv), "torch": torch.__version__, "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        args.out.write_text(json.dumps({"info": info, "rows": rows}, indent=1) + "\n")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
