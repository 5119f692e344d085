"""One factor of a Kronecker covariance: what it must satisfy, its root, and whether it can be inverted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from tensorattn.errors import OptionError

__all__ = ["Each", "Factor", "lower_cholesky", "positive_semidefinite"]

ASYMMETRY = 1e-5  # of the largest entry; torch.distributions takes as much. A factor is made symmetric before use


class MatrixConstraint(Constraint):
    """A constraint on matrices that can say which number breaks it."""

    event_dim = 2

    def require(self, name: str, value: Tensor) -> None:
        """Raise an error that names the argument and the numbers, unless the constraint holds."""
        if not bool(torch.isfinite(value).all()):
            raise OptionError(f"{name} has an entry that is not finite.")
        if not bool(self.check(value).all()):
            raise OptionError(f"{name} {self.fault(value.detach())}.")

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
        if bool((excess > 0).any()):
            *batch, row, column = (int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
            here, there = (*batch, row, column), (*batch, column, row)
            return (
                f"is not symmetric: entry {here} is {float(value[here]):.6g} "
                f"but entry {there} is {float(value[there]):.6g}"
            )
        return f"is not positive semidefinite: its eigenvalues run from {_spectrum(value)}"


class _LowerCholesky(MatrixConstraint):
    """Lower triangular with a diagonal that is not negative; zeros there make the covariance singular."""

    def check(self, value: Tensor) -> Tensor:
        lower = (value.tril() == value).all(-1).all(-1)
        return lower & (value.diagonal(dim1=-2, dim2=-1) >= 0).all(-1)

    def fault(self, value: Tensor) -> str:
        above = value.triu(1) != 0
        wrong = above if bool(above.any()) else value < 0
        wrong = wrong & torch.ones_like(wrong).triu()
        entry = tuple(int(i) for i in wrong.nonzero()[0])
        rule = "lower triangular" if bool(above.any()) else "of non-negative diagonal"
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


positive_semidefinite = _PositiveSemidefinite()
lower_cholesky = _LowerCholesky()


@dataclass(frozen=True, eq=False)
class Factor:
    """A covariance Σ = L Lᵀ of one mode or of the channels.

    Attributes:
        name: What the user calls it.
        covariance: Σ, ``(*batch, n, n)``.
        root: L, ``(*batch, n, rank)``, lower triangular where Σ has an inverse.
        singular: Whether Σ, of any batch element, is singular to rounding.
        rooted: Whether the user gave L itself, lower triangular with a diagonal of at least 0.
    """

    name: str
    covariance: Tensor
    root: Tensor
    singular: bool
    rooted: bool

    @classmethod
    def from_covariance(cls, name: str, covariance: Tensor) -> Factor:
        """Root a covariance: by Cholesky, or where that meets a zero pivot by Cholesky with pivoting."""
        covariance = (covariance + covariance.mT) / 2
        root, failure = torch.linalg.cholesky_ex(covariance)
        pivots = root.detach().diagonal(dim1=-2, dim2=-1).square()
        singular = not bool((failure == 0).all() and (pivots > _pivot_floor(covariance)).all())
        return cls(name, covariance, _pivoted_root(covariance) if singular else root, singular, rooted=False)

    @classmethod
    def from_scale_tril(cls, name: str, root: Tensor) -> Factor:
        """Take a Cholesky factor as it is; a zero on its diagonal makes the covariance singular."""
        singular = bool((root.detach().diagonal(dim1=-2, dim2=-1) == 0).any())
        return cls(name, root @ root.mT, root, singular, rooted=True)

    @property
    def size(self) -> int:
        """Size n of the mode, or number of channels."""
        return self.covariance.shape[-1]

    @property
    def constraint(self) -> MatrixConstraint:
        """What the matrix that the user gave satisfies."""
        return lower_cholesky if self.rooted else positive_semidefinite

    @property
    def scale_tril(self) -> Tensor:
        """The lower triangular root."""
        return self.root if self.rooted else self.definite_root("it has no unique Cholesky factor")

    def definite_root(self, consequence: str) -> Tensor:
        """Return the Cholesky factor of a covariance that has an inverse."""
        if self.singular:
            raise OptionError(
                f"{self.name} is singular: its eigenvalues run from {_spectrum(self.covariance.detach())}, "
                f"so {consequence}."
            )
        return self.root


def _pivoted_root(covariance: Tensor) -> Tensor:
    """Return ``(*batch, n, rank)`` with L Lᵀ = Σ, for any positive semidefinite Σ.

    Every step takes the column of the largest remaining variance, so equal rows of Σ get equal rows of L, bit for bit.
    """
    size = covariance.shape[-1]
    floor = _pivot_floor(covariance)
    rest, columns = covariance, []
    for _ in range(size):
        variances = rest.detach().diagonal(dim1=-2, dim2=-1)
        gains = torch.where(variances <= floor, 0.0, variances)  # NaN stays, to be seen in the samples
        if not bool((gains != 0).any()):
            break
        gain, pivot = gains.max(-1)
        live = (gain != 0)[..., None, None]
        index = pivot[..., None, None]
        column = rest.gather(-1, index.expand(*rest.shape[:-1], 1))  # (*batch, n, 1)
        variance = torch.where(live, column.gather(-2, index), 1.0)
        column = torch.where(live, column / variance.sqrt(), 0.0)
        columns.append(column)
        rest = rest - column @ column.mT
    return torch.cat(columns, -1) if columns else covariance[..., :0]


def _pivot_floor(covariance: Tensor) -> Tensor:
    """Return the largest value of each pivot that rounding alone explains, ``(*batch, n)``."""
    return _rounding(covariance) * covariance.detach().diagonal(dim1=-2, dim2=-1).abs()


def _rounding(matrix: Tensor) -> float:
    """Return the relative rounding error that a factorisation may leave."""
    return 8 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps


def _asymmetry(matrix: Tensor) -> Tensor:
    """Return by how much each pair of entries differs more than is allowed."""
    slack = ASYMMETRY * matrix.abs().amax((-2, -1), keepdim=True)
    return (matrix - matrix.mT).abs() - slack


def _spectrum(matrix: Tensor) -> str:
    """Name the least and the largest eigenvalue of the worst conditioned matrix of a batch."""
    values = torch.linalg.eigvalsh(matrix)[..., [0, -1]].reshape(-1, 2)
    least, most = values[(values[:, 0] / values[:, 1].abs()).nan_to_num(nan=0.0).argmin()].tolist()
    return f"{least + 0.0:.6g} to {most + 0.0:.6g}"  # no minus zero
