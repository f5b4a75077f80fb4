"""What the bits mean. One file per family; `base` has the registry and everything they share."""

from lowbit.formats import codebook, fp8, int, mx, nvfp4  # noqa: F401  (each registers its families)
from lowbit.formats.base import Format, Plane, Planes, parse_format, register, registered

__all__ = ["Format", "Plane", "Planes", "parse_format", "register", "registered"]
