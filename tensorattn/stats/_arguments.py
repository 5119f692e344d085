"""Arguments of a tensor-normal law: which matrices were given, and whether all shapes and types belong together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError
from tensorattn.stats._factor import Factor, lower_cholesky, positive_semidefinite

__all__ = [
    "Given",
    "broadcast",
    "check_batches",
    "check_event",
    "check_matrix",
    "check_numbers",
    "check_shapes",
    "check_tensor",
    "given_channels",
    "given_modes",
]


class Given(NamedTuple):
    """A matrix as the user gave it: a covariance, or if ``rooted`` its lower triangular Cholesky factor."""

    name: str
    matrix: Tensor
    rooted: bool = False

    def check(self) -> None:
        """Raise an error unless its values are those of a covariance, or of a Cholesky factor."""
        (lower_cholesky if self.rooted else positive_semidefinite).require(self.name, self.matrix)

    def factor(self) -> Factor:
        """Root it."""
        make = Factor.from_scale_tril if self.rooted else Factor.from_covariance
        return make(self.name, self.matrix)


def given_modes(covariances: Sequence[Tensor] | None, scale_trils: Sequence[Tensor] | None) -> list[Given]:
    """Name the matrices of the modes."""
    if covariances is not None and scale_trils is not None:
        raise OptionError("mode_covariances and mode_scale_trils are both given, but one says it all.")
    rooted = covariances is None
    matrices = scale_trils if covariances is None else covariances
    argument = "mode_scale_trils" if rooted else "mode_covariances"
    if matrices is None:
        raise OptionError("mode_covariances and mode_scale_trils are both missing, but one is needed.")
    if isinstance(matrices, Tensor):
        raise OptionError(
            f"{argument} is one tensor of shape {tuple(matrices.shape)}, but a sequence of one matrix a mode is needed."
        )
    return [Given(f"{argument}[{mode}]", matrix, rooted) for mode, matrix in enumerate(matrices)]


def given_channels(covariance: Tensor | None, scale_tril: Tensor | None) -> list[Given]:
    """Name the matrix of the channels, if there is one."""
    if covariance is not None and scale_tril is not None:
        raise OptionError("channel_covariance and channel_scale_tril are both given, but one says it all.")
    if covariance is not None:
        return [Given("channel_covariance", covariance)]
    return [] if scale_tril is None else [Given("channel_scale_tril", scale_tril, rooted=True)]


def check_shapes(loc: Tensor, modes: Sequence[Given], channels: Sequence[Given]) -> torch.Size:
    """Check that the arguments of a law belong together, and return its batch shape."""
    factors = [*modes, *channels]
    if not factors:
        raise ModesError("mode_covariances is empty and there are no channels, so the event has no dimension.")
    check_tensor("loc", loc)
    for name, matrix, _ in factors:
        check_matrix(name, matrix)
        if matrix.dtype != loc.dtype:
            raise DtypeError(f"loc is {loc.dtype} but {name} is {matrix.dtype}.")
    sizes = [(given.name, given.matrix.shape[-1]) for given in factors]
    hint = "" if channels else "Without a channel factor the event is (n_1, ..., n_N): the last dimension is a mode."
    batch = check_event("loc", loc, sizes, len(modes), hint)
    batches = [("loc", batch), *((given.name, given.matrix.shape[:-2]) for given in factors)]
    check_batches(batches)
    return torch.broadcast_shapes(*(shape for _, shape in batches))


def check_event(name: str, tensor: Tensor, sizes: Sequence[tuple[str, int]], order: int, hint: str = "") -> torch.Size:
    """Check the last dimensions of a tensor against those of the other arguments named, and return the rest."""
    first = tensor.dim() - len(sizes)
    if first < 0:
        raise ShapeError(
            f"{name} has {tensor.dim()} dimensions, but {len(sizes)} are needed: {order} modes and "
            f"{len(sizes) - order} for channels."
        )
    for dim, (other, size) in enumerate(sizes):
        found = tensor.shape[first + dim]
        if found != size:
            place = f"mode {dim} has" if dim < order else "the channels have"
            raise ShapeError(f"{place} size {found} in {name} but {size} in {other}.", hint=hint)
    return tensor.shape[:first]


def check_batches(batches: Sequence[tuple[str, torch.Size]]) -> None:
    """Check that batch shapes broadcast, and name the first two that do not."""
    for (name, shape), (other, other_shape) in itertools.combinations(batches, 2):
        if broadcast(shape, other_shape) is None:
            raise ShapeError(
                f"batch dimensions are {tuple(shape)} in {name} but {tuple(other_shape)} in {other}, "
                "which do not broadcast."
            )


def broadcast(shape: torch.Size, other: torch.Size) -> torch.Size | None:
    """Return the shape that two shapes broadcast to, or None."""
    try:
        return torch.broadcast_shapes(shape, other)
    except RuntimeError:
        return None


def check_matrix(name: str, matrix: Tensor) -> None:
    """Check that an argument is a batch of square matrices of a supported type."""
    check_tensor(name, matrix)
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ShapeError(f"{name} has shape {tuple(matrix.shape)}, but (*batch, n, n) is needed.")
    if matrix.shape[-1] == 0:
        raise ShapeError(f"{name} has size 0, but every factor needs at least 1.")


def check_tensor(name: str, tensor: Tensor) -> None:
    """Check that an argument is a tensor of a type that has a Cholesky factorisation."""
    if not isinstance(tensor, Tensor):
        raise DtypeError(f"{name} is a {type(tensor).__name__}, but a tensor is needed.")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise DtypeError(f"{name} is {tensor.dtype}, but torch.float32 or torch.float64 is needed.")


def check_numbers(name: str, tensor: Tensor) -> None:
    """Check that a tensor has no NaN."""
    if bool(tensor.isnan().any()):
        raise OptionError(f"{name} has a NaN.")
