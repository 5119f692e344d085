"""What tests of functions share: grids, weights, masks, layouts in memory, and every operator with its options."""

from __future__ import annotations

import math

import pytest
import torch
from modules import draw

from tensorattn.testing.variants import variants

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
VARIANTS = variants()
CAUSAL = [variant for variant in VARIANTS if "causal" not in variant.lacks]

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
every_causal_variant = pytest.mark.parametrize("variant", CAUSAL, ids=str)

# torch scripts some decompositions the first time that it differentiates forward.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def grid(order, batch=(2,), dim=3):
    """Shape of a tensor of an order, with neighbouring modes of different sizes."""
    largest = {1: 9, 2: 7, 3: 5, 4: 4, 5: 4, 6: 3, 7: 3, 8: 2}[order]
    return (*batch, *(max(1, largest - mode % 3) for mode in range(order)), dim)


def positive(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def holes(*shape, seed=0):
    """A random mask that is no product over modes, with an empty slice in the first sample."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.35
    mask[0, 0] = False
    mask.view(shape[0], -1)[:, -1] = True
    return mask


def tensors(sizes, batch=2, dim=3, dtype=torch.float64):
    """Queries, keys and values."""
    return [draw(batch, *sizes, dim, seed=seed, dtype=dtype) for seed in range(3)]


def fits(variant, order):
    """Whether the modes that the options name exist at an order."""
    return max((mode for kept in variant.options.get("kept", ()) for mode in kept), default=0) < order


def at_sizes(*sizes, of=VARIANTS, default=((3, 4),)):
    """Every operator at some sizes, most of them in the thorough tests alone."""
    return pytest.mark.parametrize(
        ("variant", "sizes"),
        [
            pytest.param(variant, each, id=f"{variant} {each}", marks=() if each in default else pytest.mark.thorough)
            for variant in of
            for each in sizes
            if fits(variant, len(each))
        ],
    )


def close(ours, theirs, **tolerance):
    """Compare tensors, one by one."""
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, **(tolerance or CLOSE))


def over_grid(vectors, sizes, batch=()):
    """The product of one vector a mode, ``(*batch, *sizes)``; None for ones."""
    total = torch.ones(*batch, *sizes, dtype=torch.float64)
    for mode, vector in enumerate(vectors or [None] * len(sizes)):
        if vector is not None:
            shape = (vector.shape[-1] if k == mode else 1 for k in range(len(sizes)))
            total = total * vector.reshape(*vector.shape[:-1], *shape)
    return total


def permuted(tensor, dims):
    """The same values, laid out in memory in another order of dimensions."""
    dims = list(dims)
    return tensor.permute(dims).contiguous().permute([dims.index(d) for d in range(len(dims))])


def sliced(tensor):
    """The same values as every second element, from the second on, of a larger tensor in each dimension."""
    larger = torch.full([2 * size + 1 for size in tensor.shape], math.nan, dtype=tensor.dtype)
    return larger[(slice(1, None, 2),) * tensor.dim()].copy_(tensor)


LAYOUTS = {
    "dense": lambda x: x.contiguous(),
    "channels first": lambda x: permuted(x, [0, x.dim() - 1, *range(1, x.dim() - 1)]),
    "reversed": lambda x: permuted(x, range(x.dim())[::-1]),
    "channels between": lambda x: permuted(x, [*range(x.dim() - 2), x.dim() - 1, x.dim() - 2]),
    "batch last": lambda x: permuted(x, [*range(1, x.dim()), 0]),
    "sliced": sliced,
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 1) * x.dim())[(slice(1, -1),) * x.dim()],
}
