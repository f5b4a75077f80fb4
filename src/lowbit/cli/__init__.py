"""The command line, `lowbit ...`. What it needs beyond the library is the extra `cli`."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("typer", "rich")


def main() -> None:
    """Entry point of the script `lowbit`; says how to install what is missing instead of failing on an import."""
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        print(
            f"lowbit: the command line needs the package{'s' if len(missing) > 1 else ''} {' and '.join(missing)}; "
            "install with: pip install 'lowbit[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    from lowbit.cli.app import app

    app()
