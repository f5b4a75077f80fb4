"""How many weights share one scale. Names and meaning are torchao's."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.errors import see


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    tile = (None, None)
    spec = "tensor"


@dataclass(frozen=True)
class PerRow:
    """One scale per output channel of a weight `(N, K)`, or per token of an activation `(M, K)`."""

    tile = (1, None)
    spec = "row"


# A token is a row of the activation; the second name keeps configs readable.
PerToken = PerRow


def PerAxis(axis: int) -> PerRow:
    """torchao's spelling of `PerRow`: only axis 0, the output channel, can be quantized.

    Raises:
        ValueError: `axis` is not 0.
    """
    if axis != 0:
        raise ValueError(
            f"PerAxis: axis must be 0 (one scale per output channel), got {axis}; use PerGroup for K"
            + see("bad-option")
        )
    return PerRow()


@dataclass(frozen=True)
class PerGroup:
    """One scale per `group_size` consecutive weights along K. The last group may be shorter."""

    group_size: int

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"PerGroup: group_size must be at least 1, got {self.group_size}" + see("bad-option"))

    @property
    def tile(self) -> tuple[int, int]:
        return (1, self.group_size)

    @property
    def spec(self) -> str:
        return f"g{self.group_size}"


@dataclass(frozen=True)
class PerBlock:
    """One scale per block of `block_size = (rows, columns)` weights. Blocks at the edges may be smaller."""

    block_size: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        if len(self.block_size) != 2 or min(self.block_size) < 1:
            raise ValueError(
                f"PerBlock: block_size must be two positive sizes (rows, columns), got {self.block_size}"
                + see("bad-option")
            )
        object.__setattr__(self, "block_size", tuple(self.block_size))

    @property
    def tile(self) -> tuple[int, int]:
        return self.block_size

    @property
    def spec(self) -> str:
        return f"b{self.block_size[0]}x{self.block_size[1]}"


Granularity = PerTensor | PerRow | PerGroup | PerBlock


def parse_granularity(token: str) -> Granularity | None:
    """`tensor`, `row`, `g128`, `b128x128` -> the granularity; None when the token is something else."""
    if token == "tensor":
        return PerTensor()
    if token == "row":
        return PerRow()
    if token[:1] == "g" and token[1:].isdigit():
        return PerGroup(int(token[1:]))
    rows, x, columns = token[1:].partition("x")
    if token[:1] == "b" and x and rows.isdigit() and columns.isdigit():
        return PerBlock((int(rows), int(columns)))
    return None
