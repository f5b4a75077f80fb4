"""What the kernels of Hopper's matrix units share on the host (`tiles.cuh`): shapes of tiles, blocks, and the memory in
which blocks exchange sums."""

from __future__ import annotations

import ctypes
import itertools
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from lowbit.kernels.problem import Problem

# What a block may use, less what lies beside the rings (barriers and tables).
SHARED_PER_BLOCK = 216 << 10
# Of a multiprocessor, each of 32 bits for one thread.
REGISTERS = 65536


@dataclass(frozen=True)
class Tiling:
    """One instance of a kernel.

    Attributes:
        columns: of a product, a multiple of 8 up to 256.
        row_tiles: tiles of 64 rows per warpgroup, 1 or 2.
        cut: whether the last tiles are cut along K so that every block has the same share of the work.
        blocks: resident per multiprocessor, 1 or 2.
        warpgroups: that multiply, 1 to 3.
        split: blocks that share the K of a tile: 1, 2, 4 or 8.
        turned: whether tokens are the rows and rows of W the columns, which else are the other way round.
    """

    columns: int
    row_tiles: int = 1
    cut: bool = False
    blocks: int = 1
    warpgroups: int = 2
    split: int = 1
    turned: bool = False

    @property
    def product_rows(self) -> int:
        """Per block."""
        return 64 * self.row_tiles * self.warpgroups

    @property
    def rows(self) -> int:
        """Of W per block."""
        return self.columns if self.turned else self.product_rows

    @property
    def tokens(self) -> int:
        """Per block."""
        return self.product_rows if self.turned else self.columns

    def tiles(self, m: int, n: int) -> int:
        """That cover `y (M, N)`."""
        return -(-n // self.rows) * -(-m // self.tokens)

    def threads(self, beside: int = 1) -> int:
        """Of a block: the warpgroups that multiply, and those `beside` them."""
        return 128 * (self.warpgroups + beside)

    def registers_at_launch(self, beside: int = 1) -> int:
        """Per thread, whole eights."""
        return REGISTERS // self.blocks // self.threads(beside) // 8 * 8

    def registers(self, *beside: int) -> int:
        """Per thread of a warpgroup that multiplies, where those beside have these.

        They share what the block starts with; asking for more would wait forever.
        """
        pool = self.registers_at_launch(len(beside)) * (self.warpgroups + len(beside))
        return min(240, (pool - sum(beside)) // self.warpgroups // 8 * 8)

    @property
    def output_bytes(self) -> int:
        """Of shared memory, through which warps write."""
        at_once = min(self.columns // self.split, 32)
        return 4 * self.warpgroups * (16 * (2 * at_once + 16) if self.turned else at_once * 48)

    def __str__(self) -> str:
        cut = " cut" if self.cut else ""
        split = f" split {self.split}" if self.split > 1 else ""
        turned = " turned" if self.turned else ""
        return f"{self.rows}x{self.tokens}{turned}{cut}{split} warpgroups {self.warpgroups} blocks {self.blocks}"


class Exchange(ctypes.Structure):
    """`struct Exchange` of tiles.cuh."""

    _fields_ = (("sums", ctypes.c_void_p), ("flags", ctypes.c_void_p), ("number", ctypes.c_uint64))


class Shares(NamedTuple):
    """How blocks share the tiles of one product: their number, and the bytes of what they exchange."""

    blocks: int
    sums: int
    flags: int

    def fill(self, exchange: Exchange, address: int) -> None:
        """For one launch, with the memory that begins at `address`."""
        exchange.sums, exchange.flags, exchange.number = address, address + self.sums, next(_launches)


# Numbers that memory holds by chance as good as never.
_launches = itertools.count(secrets.randbits(62) + 1)


T = TypeVar("T", bound=Tiling)


def fastest(tilings: Iterable[T], cycles: Callable[[T], float], m: int, n: int, sms: int) -> T:
    """The instance of the least `cycles`. Blocks that share tiles wait for each other, and so belong in one wave."""
    return min((c for c in tilings if c.split == 1 or c.tiles(m, n) * c.split <= sms * c.blocks), key=cycles)


def why_not_hopper(problem: Problem) -> str | None:
    """Why kernels of Hopper's matrix units cannot run a problem; nothing against one whose GPU is not known."""
    if problem.arch is not None and problem.arch != (9, 0):
        return f"needs Hopper's matrix units (9.0), this GPU has {problem.arch[0]}.{problem.arch[1]}"
    return None


def shares(c: Tiling, m: int, n: int, steps: int, sms: int) -> Shares:
    """For `steps` of K and a GPU with `sms` multiprocessors.

    Raises:
        ValueError: there are fewer steps than blocks that are to share them.
    """
    if steps < c.split:
        raise ValueError(f"K has {steps} steps, too few for {c.split} blocks to share")
    tiles, units = c.tiles(m, n), steps if c.cut else 1
    # A block that shares a tile along K has no other.
    blocks = tiles * c.split if c.split > 1 else min(tiles * units, sms * c.blocks)
    if not c.cut and c.split == 1:
        return Shares(blocks, 0, 0)
    return Shares(blocks, 4 * blocks * c.rows * c.tokens, 8 * blocks * c.warpgroups * c.split)
