"""Where lowbit keeps what it can make again: compiled kernels and the demo's model."""

from __future__ import annotations

import os
from pathlib import Path


def cache_path() -> Path:
    """`$LOWBIT_CACHE`, else `$XDG_CACHE_HOME/lowbit`, else `~/.cache/lowbit`. It need not exist.

    Raises:
        FileNotFoundError: no variable is set and the user has no home, as in some containers.
    """
    if own := os.environ.get("LOWBIT_CACHE"):
        return Path(own).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "lowbit"
    try:
        return Path.home() / ".cache" / "lowbit"
    except RuntimeError as error:
        raise FileNotFoundError("the user has no home directory; set LOWBIT_CACHE to a folder for caches") from error


def cache_dir(*parts: str) -> Path:
    """A folder below `cache_path()`, made on demand, readable by the user only."""
    path = cache_path().joinpath(*parts)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
