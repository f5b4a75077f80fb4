"""What the kernels of Hopper's matrix units share on the host (`tiles.cuh`): shapes of tiles, blocks, and the memory in
which blocks exchange sums."""

from __future__ import annotations

import ctypes
import itertools
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from lowbit.kernels.cuda import loader
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
        cluster: blocks with tiles of the same tokens that bring these for each other: 1 or 2.
    """

    columns: int
    row_tiles: int = 1
    cut: bool = False
    blocks: int = 1
    warpgroups: int = 2
    split: int = 1
    turned: bool = False
    cluster: int = 1

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
        """That cover `y (M, N)`, of whole clusters."""
        return -(-n // (self.cluster * self.rows)) * self.cluster * -(-m // self.tokens)

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

    def resident(self, sms: int) -> int:
        """Blocks that a GPU with `sms` multiprocessors holds at once, in whole clusters."""
        return sms // self.cluster * self.cluster * self.blocks

    @property
    def output_buffers(self) -> int:
        """Runs of outputs of a warpgroup in shared memory: one is filled while the one before is written."""
        return 1 if self.blocks > 1 else 2

    @property
    def run(self) -> int:
        """Columns of a run of 64 rows of outputs that the copy engine writes at once."""
        finished = self.columns // self.split
        return 64 if finished % 64 == 0 else min(finished, 32)

    @property
    def output_bytes(self) -> int:
        """Of shared memory, through which warpgroups or, where y has odd rows, warps write."""
        at_once = min(self.columns // self.split, 32)
        bulk = self.output_buffers * 128 * (64 if self.turned else self.run)
        return self.warpgroups * max(bulk, 4 * (16 * (2 * at_once + 16) if self.turned else at_once * 48))

    def output_box(self, n: int) -> int:
        """Tokens of a run of outputs `(M, n)` that the copy engine writes, 0 where warps write them.

        It takes rows that begin at multiples of 16 bytes, and runs of 128. Where blocks share a tile, outputs are few
        and the last thing that happens: warps write them sooner.
        """
        if n % 8 or self.split > 1 or (self.turned and self.run < 64):
            return 0
        return 64 if self.turned else self.run

    def output_defines(self, n: int) -> loader.Defines:
        """The constants of tiles.cuh that follow from it."""
        return (("BULK_OUT", int(self.output_box(n) > 0)), ("OUT_BUFFERS", self.output_buffers))

    def __str__(self) -> str:
        cut = " cut" if self.cut else ""
        split = f" split {self.split}" if self.split > 1 else ""
        cluster = f" cluster {self.cluster}" if self.cluster > 1 else ""
        tile = f"{self.rows}x{self.tokens}" + (" turned" if self.turned else "")
        return f"{tile}{cut}{split}{cluster} warpgroups {self.warpgroups} blocks {self.blocks}"


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
    return min((c for c in tilings if c.split == 1 or c.tiles(m, n) * c.split <= c.resident(sms)), key=cycles)


def why_not_hopper(problem: Problem) -> str | None:
    """Why kernels of Hopper's matrix units cannot run a problem; nothing against one whose GPU is not known."""
    if problem.arch is not None and problem.arch != (9, 0):
        return f"needs Hopper's matrix units (9.0), this GPU has {problem.arch[0]}.{problem.arch[1]}"
    return None


def shares(c: Tiling, m: int, n: int, steps: int, resident: int) -> Shares:
    """For `steps` of K and a GPU that holds `resident` blocks at once.

    Raises:
        ValueError: there are fewer steps than blocks that are to share them.
    """
    if steps < c.split:
        raise ValueError(f"K has {steps} steps, too few for {c.split} blocks to share")
    tiles, units = c.tiles(m, n), steps if c.cut else 1
    # A block that shares a tile along K has no other.
    blocks = tiles * c.split if c.split > 1 else min(tiles * units, resident)
    if not c.cut and c.split == 1:
        return Shares(blocks, 0, 0)
    return Shares(blocks, 4 * blocks * c.rows * c.tokens, 8 * blocks * c.warpgroups * c.split)
