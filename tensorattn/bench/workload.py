"""Workload: the tensor that is worked on, and how; the same numbers for everyone who works on it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorattn.errors import OptionError

__all__ = ["DTYPES", "LAYOUTS", "Workload", "parse_shape"]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
FEW = 4096  # positions of a small grid
LAYOUTS = ("channels_last", "channels_first")


@dataclass(frozen=True)
class Workload:
    """A tensor and what is done with it.

    Attributes:
        batch: Batch entries.
        sizes: Sizes of the modes.
        dim: Channels.
        heads: Number of heads.
        dtype: Name of the type.
        layout: Where the channels lie in memory.
        backward: Whether the backward pass runs too.
        skip: Whether the input is added to the output.
        into: Whether the output goes into a tensor that is there already.
    """

    batch: int
    sizes: tuple[int, ...]
    dim: int
    heads: int = 4
    dtype: str = "float32"
    layout: str = "channels_last"
    backward: bool = False
    skip: bool = False
    into: bool = False

    @property
    def order(self) -> int:
        """Number of modes N."""
        return len(self.sizes)

    @property
    def positions(self) -> int:
        """Number of positions P, all batch entries together."""
        return self.batch * math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return self.positions * self.dim * DTYPES[self.dtype].itemsize

    @property
    def channels_first(self) -> bool:
        """Whether channels lie before the modes."""
        return self.layout == "channels_first"

    def __str__(self) -> str:
        shape = "×".join(map(str, (self.batch, *self.sizes, self.dim)))
        words = [self.layout.replace("_", " "), "forward + backward" if self.backward else "forward"]
        words += ["with skip"] if self.skip else []
        words += ["into out"] if self.into else []
        return f"{shape} ({self.bytes / 1e6:.1f} MB), {self.dtype}, {', '.join(words)}"

    def smaller(self) -> Workload:
        """Return the same on a small grid, which loads the code that the large one takes without holding memory."""
        sizes = list(self.sizes)
        while math.prod(sizes) > FEW:
            longest = sizes.index(max(sizes))
            sizes[longest] = sizes[longest] // 2
        return dataclasses.replace(self, batch=1, sizes=tuple(sizes))

    def tensor(self, seed: int = 0) -> Tensor:
        """Draw a tensor in its layout: noise about an outer sum, so that averages tell positions apart.

        Args:
            seed: Seed of the numbers.
        """
        generator = torch.Generator().manual_seed(seed)
        dtype = DTYPES[self.dtype]
        channels = (self.dim, *(1 for _ in self.sizes)) if self.channels_first else (*(1 for _ in self.sizes), self.dim)
        shape = (self.dim, *self.sizes) if self.channels_first else (*self.sizes, self.dim)
        x = torch.randn((self.batch, *shape), generator=generator).to(dtype)
        for mode, size in enumerate(self.sizes):
            along = list(channels)
            along[mode + self.channels_first] = size
            x += torch.randn((self.batch, *along), generator=generator).to(dtype)
        return x

    def as_record(self) -> dict[str, Any]:
        """Return the attributes by name, for files."""
        return dataclasses.asdict(self)


def parse_shape(text: str) -> tuple[int, tuple[int, ...], int]:
    """Read a shape ``B,n_1,…,n_N,C``.

    Args:
        text: Whole numbers with commas between.

    Returns:
        Batch entries, sizes of the modes, and channels.

    Raises:
        OptionError: If it is none.

    Examples:
        >>> parse_shape("2,16,56,56,96")
        (2, (16, 56, 56), 96)
    """
    try:
        batch, *sizes, dim = (int(number) for number in text.split(","))
    except ValueError:
        raise OptionError(f"--shape must be B,n_1,...,n_N,C in whole numbers, got {text!r}.") from None
    if not sizes or min(batch, dim, *sizes) < 1:
        raise OptionError(f"--shape must be B,n_1,...,n_N,C with at least one mode and no size below 1, got {text!r}.")
    return batch, tuple(sizes), dim
