"""One factor of a Kronecker covariance: what it must satisfy, its root, and whether it can be inverted."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from tensorattn.errors import DtypeError, OptionError, ShapeError

__all__ = ["Each", "Factor", "Given", "MatrixConstraint", "check_tensor", "dense_kronecker"]

ASYMMETRY = 1e-5  # of the largest entry; torch.distributions takes as much. A factor is made symmetric before use
DENSE_ENTRIES = 1 << 24  # of a dense Kronecker product: 128 MB in float64


class MatrixConstraint(Constraint):
    """A constraint on matrices that can say which number breaks it."""

    event_dim = 2

    def fault(self, value: Tensor) -> str:
        """Say what is wrong with a finite value that breaks the constraint."""
        raise NotImplementedError


class _PositiveSemidefinite(MatrixConstraint):
    """Symmetric and without negative eigenvalue, both to rounding: the all-ones matrix qualifies."""

    def check(self, value: Tensor) -> Tensor:
        matrix = torch.nan_to_num(value.detach())
        symmetric = _asymmetry(matrix).amax((-2, -1)) <= 0
        least, most = torch.linalg.eigvalsh(matrix)[..., [0, -1]].unbind(-1)
        return torch.isfinite(value).all(-1).all(-1) & symmetric & (least >= -_rounding(matrix) * most)

    def fault(self, value: Tensor) -> str:
        excess = _asymmetry(value)
        if not bool((excess > 0).any()):
            return f"is not positive semidefinite: its eigenvalues run from {_spectrum(value)}"
        *batch, row, column = (int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        here, there = (*batch, row, column), (*batch, column, row)
        return (
            f"is not symmetric: entry {here} is {float(value[here]):.6g} but entry {there} is {float(value[there]):.6g}"
        )


class _LowerCholesky(MatrixConstraint):
    """Lower triangular with a diagonal that is not negative; zeros there make the covariance singular."""

    def check(self, value: Tensor) -> Tensor:
        lower = (value.tril() == value).all(-1).all(-1)
        return lower & (value.diagonal(dim1=-2, dim2=-1) >= 0).all(-1)

    def fault(self, value: Tensor) -> str:
        above = value.triu(1) != 0
        triangular = not bool(above.any())
        wrong = torch.diag_embed(value.diagonal(dim1=-2, dim2=-1) < 0) if triangular else above
        entry = tuple(int(i) for i in wrong.nonzero()[0])
        rule = "of non-negative diagonal" if triangular else "lower triangular"
        return f"is not {rule}: entry {entry} is {float(value[entry]):.6g}"


class Each(Constraint):
    """One constraint for every tensor of a sequence.

    Args:
        constraint: What each tensor must satisfy.
    """

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint
        self.event_dim = constraint.event_dim
        super().__init__()

    def check(self, value: Sequence[Tensor]) -> Tensor:
        """Return for every batch element whether all tensors satisfy the constraint."""
        checked = torch.broadcast_tensors(*(self.constraint.check(tensor) for tensor in value))
        return torch.stack(checked).all(0)

    def __repr__(self) -> str:
        return f"Each({self.constraint!r})"


class Given(NamedTuple):
    """A matrix as the user gave it: a covariance, or if ``rooted`` its lower triangular Cholesky factor."""

    name: str
    matrix: Tensor
    rooted: bool = False

    @property
    def constraint(self) -> MatrixConstraint:
        """What the matrix satisfies."""
        return _LowerCholesky() if self.rooted else _PositiveSemidefinite()

    def check_shape(self) -> None:
        """Refuse what is no batch of square matrices of a type that has a Cholesky factorisation."""
        check_tensor(self.name, self.matrix)
        if self.matrix.dim() < 2 or self.matrix.shape[-1] != self.matrix.shape[-2]:
            raise ShapeError(f"{self.name} has shape {tuple(self.matrix.shape)}, but (*batch, n, n) is needed.")
        if self.matrix.shape[-1] == 0:
            raise ShapeError(f"{self.name} has size 0, but every factor needs at least 1.")

    def check_values(self) -> None:
        """Refuse values that are not those of a covariance, or of a Cholesky factor."""
        if not bool(torch.isfinite(self.matrix).all()):
            raise OptionError(f"{self.name} has an entry that is not finite.")
        if not bool(self.constraint.check(self.matrix).all()):
            raise OptionError(f"{self.name} {self.constraint.fault(self.matrix.detach())}.")

    def factor(self) -> Factor:
        """Root it: by Cholesky, or where that meets a zero pivot by Cholesky with pivoting."""
        if self.rooted:
            singular = bool((self.matrix.detach().diagonal(dim1=-2, dim2=-1) == 0).any())
            return Factor(self, self.matrix @ self.matrix.mT, self.matrix, singular)
        covariance = (self.matrix + self.matrix.mT) / 2
        root, failure = torch.linalg.cholesky_ex(covariance)
        pivots = root.detach().diagonal(dim1=-2, dim2=-1).square()
        singular = not bool((failure == 0).all() and (pivots > _pivot_floor(covariance)).all())
        return Factor(self, covariance, _pivoted_root(covariance) if singular else root, singular)


@dataclass(frozen=True, eq=False)
class Factor:
    """A covariance Σ = L Lᵀ of one mode or of the channels.

    Attributes:
        given: What the user gave.
        covariance: Σ, ``(*batch, n, n)``.
        root: L, ``(*batch, n, rank)``, lower triangular where Σ has an inverse.
        singular: Whether Σ, of any batch element, is singular to rounding.
    """

    given: Given
    covariance: Tensor
    root: Tensor
    singular: bool

    @property
    def scale_tril(self) -> Tensor:
        """The lower triangular root."""
        return self.root if self.given.rooted else self.definite_root("it has no unique Cholesky factor")

    def definite_root(self, consequence: str) -> Tensor:
        """Return the Cholesky factor of a covariance that has an inverse."""
        if self.singular:
            spectrum = _spectrum(self.covariance.detach())
            raise OptionError(f"{self.given.name} is singular: its eigenvalues run from {spectrum}, so {consequence}.")
        return self.root


def check_tensor(name: str, tensor: Tensor) -> None:
    """Check that an argument is a tensor of a type that has a Cholesky factorisation."""
    if not isinstance(tensor, Tensor):
        raise DtypeError(f"{name} is a {type(tensor).__name__}, but a tensor is needed.")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise DtypeError(f"{name} is {tensor.dtype}, but torch.float32 or torch.float64 is needed.")


def dense_kronecker(factors: Sequence[Tensor]) -> Tensor:
    """Multiply matrices ``(*batch, p_k, q_k)`` out; the last one varies fastest, as in ``torch.kron``."""
    batch = torch.broadcast_shapes(*(f.shape[:-2] for f in factors))
    rows, columns = (math.prod(f.shape[d] for f in factors) for d in (-2, -1))
    entries = math.prod(batch) * rows * columns
    if entries > DENSE_ENTRIES:
        raise ShapeError(
            f"the dense matrix would be {rows} by {columns}, in all {entries} entries, "
            f"more than the {DENSE_ENTRIES} that are allowed.",
            hint="Its factors are small: work with those.",
        )
    return functools.reduce(_kron, factors)


def _kron(left: Tensor, right: Tensor) -> Tensor:
    """Return the Kronecker product of two batches of matrices."""
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2, -1)


def _pivoted_root(covariance: Tensor) -> Tensor:
    """Return ``(*batch, n, rank)`` with L Lᵀ = Σ, for any positive semidefinite Σ.

    Every step takes the column of the largest remaining variance, so equal rows of Σ get equal rows of L, bit for bit.
    """
    floor, rest, columns = _pivot_floor(covariance), covariance, [covariance[..., :0]]
    for _ in range(covariance.shape[-1]):
        variances = rest.detach().diagonal(dim1=-2, dim2=-1)
        gains = torch.where(variances <= floor, 0.0, variances)  # NaN stays, to be seen in the samples
        if not bool((gains != 0).any()):
            break
        gain, pivot = gains.max(-1)
        live, index = (gain != 0)[..., None, None], pivot[..., None, None]
        column = rest.gather(-1, index.expand(*rest.shape[:-1], 1))  # (*batch, n, 1)
        variance = torch.where(live, column.gather(-2, index), 1.0)
        column = torch.where(live, column / variance.sqrt(), 0.0)
        columns.append(column)
        rest = rest - column @ column.mT
    return torch.cat(columns, -1)


def _pivot_floor(covariance: Tensor) -> Tensor:
    """Return the largest value of each pivot that rounding alone explains, ``(*batch, n)``."""
    return _rounding(covariance) * covariance.detach().diagonal(dim1=-2, dim2=-1).abs()


def _rounding(matrix: Tensor) -> float:
    """Return the relative rounding error that a factorisation may leave."""
    return 8 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps


def _asymmetry(matrix: Tensor) -> Tensor:
    """Return by how much each pair of entries differs more than is allowed."""
    return (matrix - matrix.mT).abs() - ASYMMETRY * matrix.abs().amax((-2, -1), keepdim=True)


def _spectrum(matrix: Tensor) -> str:
    """Name the least and the largest eigenvalue of the worst conditioned matrix of a batch."""
    values = torch.linalg.eigvalsh(matrix)[..., [0, -1]].reshape(-1, 2)
    least, most = values[(values[:, 0] / values[:, 1].abs()).nan_to_num(nan=0.0).argmin()].tolist()
    return f"{least + 0.0:.6g} to {most + 0.0:.6g}"  # no minus zero
