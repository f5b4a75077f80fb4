"""Where lowbit keeps what it can make again: compiled kernels and the demo's model."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """`$LOWBIT_CACHE`, or `lowbit` below `$XDG_CACHE_HOME` or `~/.cache`; made on demand, readable by the user only."""
    base = os.environ.get("LOWBIT_CACHE")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lowbit")
    path = Path(base, *parts)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
