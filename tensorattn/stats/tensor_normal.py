"""The tensor-normal law: Gaussian tensors whose covariance is a Kronecker product, one factor a mode."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from tensorattn.errors import DtypeError, ShapeError, TensorAttentionError, retells
from tensorattn.stats._arguments import (
    broadcast,
    check_batches,
    check_event,
    check_numbers,
    check_shapes,
    check_tensor,
    given_channels,
    given_modes,
)
from tensorattn.stats._factor import Each, Factor
from tensorattn.stats._kronecker import apply_along, dense_kronecker, outer_product

__all__ = ["TensorNormal"]

Size = torch.Size | Sequence[int]


class TensorNormal(Distribution):
    r"""A Gaussian law of tensors with one covariance a mode and one of the channels.

    The event is a tensor :math:`(n_1, \dots, n_N, D)`, and its covariance, of the row-major flattening (the channel
    varies fastest), is a Kronecker product that is never formed:

    .. math:: X \sim \mathcal N(\mathrm{loc},\; \Sigma_1 \otimes \dots \otimes \Sigma_N \otimes \Sigma_c),
        \qquad X = \mathrm{loc} + Z \times_1 L_1 \cdots \times_N L_N \times_{N+1} L_c, \quad L L^\top = \Sigma .

    Without a channel factor the event has no channel dimension: of order 1 this is
    `torch.distributions.MultivariateNormal`, of order 2 the matrix normal. Singular factors make a law with samples
    and moments but no density. If all mode factors but one are the all-ones matrix :math:`11^\top` and ``loc`` is
    additive over the modes, every sample is additive, so that additive attention equals full attention.

    Args:
        loc: Mean.
        mode_covariances: One symmetric positive semidefinite matrix a mode.
        channel_covariance: The same for the channels. None: the event has no channels.
        mode_scale_trils: Instead of ``mode_covariances``, their Cholesky factors, lower triangular. A zero on the
            diagonal makes a factor singular.
        channel_scale_tril: Instead of ``channel_covariance``, its Cholesky factor.
        validate_args: Whether to check values, as in `torch.distributions`. Shapes are always checked.

    Raises:
        ShapeError: If sizes or batch shapes disagree.
        DtypeError: If the tensors are not all float32 or all float64.
        ModesError: If there are neither modes nor channels.
        OptionError: If a factor is given twice or not at all, is not symmetric or not positive semidefinite, or a
            Cholesky factor is not lower triangular with a diagonal of at least 0.

    Shape:
        - loc: :math:`(*, n_1, \dots, n_N, D)`, or without :math:`D`
        - mode_covariances[m], mode_scale_trils[m]: :math:`(*, n_m, n_m)`, channels :math:`(*, D, D)`
        - batch dimensions :math:`*` broadcast

    Examples:
        >>> rows, columns = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.ones(3, 3)
        >>> law = TensorNormal(torch.zeros(2, 3, 4), [rows, columns], torch.eye(4))
        >>> law.event_shape, law.variance[0, 0]
        (torch.Size([2, 3, 4]), tensor([2., 2., 2., 2.]))
        >>> sample = law.sample((5,))
        >>> sample.shape, bool((sample == sample[:, :, :1]).all())  # constant along the all-ones mode
        (torch.Size([5, 2, 3, 4]), True)
    """

    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        mode_covariances: Sequence[Tensor] | None = None,
        channel_covariance: Tensor | None = None,
        *,
        mode_scale_trils: Sequence[Tensor] | None = None,
        channel_scale_tril: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        validating = Distribution._validate_args if validate_args is None else validate_args
        try:
            modes = given_modes(mode_covariances, mode_scale_trils)
            channels = given_channels(channel_covariance, channel_scale_tril)
            batch_shape = check_shapes(loc, modes, channels)
            if validating:
                check_numbers("loc", loc)
                for given in (*modes, *channels):
                    given.check()
        except TensorAttentionError as cause:
            raise cause.retold(type(self).__name__) from None
        self._modes = tuple(given.factor() for given in modes)
        self._channels = tuple(given.factor() for given in channels)  # none or one
        event_shape = loc.shape[loc.dim() - len(self._factors) :]
        self.loc = loc.expand(batch_shape + event_shape)
        super().__init__(batch_shape, event_shape, validate_args=False)  # done above, in the words of this library
        self._validate_args = validating

    @retells
    def expand(self, batch_shape: Size, _instance: Any = None) -> TensorNormal:
        """Return the same law with its batch dimensions expanded, which takes no memory.

        Args:
            batch_shape: Batch shape to expand to.

        Returns:
            A law of that batch shape.

        Raises:
            ShapeError: If the present batch shape does not expand to it.
        """
        shape = torch.Size(batch_shape)
        if broadcast(shape, self._batch_shape) != shape:
            raise ShapeError(f"batch_shape is {tuple(shape)}, but {tuple(self._batch_shape)} does not expand to it.")
        new: TensorNormal = self._get_checked_instance(TensorNormal, _instance)
        new._modes, new._channels = self._modes, self._channels
        new.loc = self.loc.expand(shape + self._event_shape)
        super(TensorNormal, new).__init__(shape, self._event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def order(self) -> int:
        """Number of modes N."""
        return len(self._modes)

    @property
    def mode_covariances(self) -> tuple[Tensor, ...]:
        """Covariance of every mode, ``(*batch, n_m, n_m)``."""
        return tuple(self._batched(factor.covariance) for factor in self._modes)

    @property
    def channel_covariance(self) -> Tensor | None:
        """Covariance of the channels, ``(*batch, D, D)``, or None."""
        return next((self._batched(factor.covariance) for factor in self._channels), None)

    @property
    @retells
    def mode_scale_trils(self) -> tuple[Tensor, ...]:
        """Cholesky factor of every mode. A singular covariance has none that is unique, which is an error."""
        return tuple(self._batched(factor.scale_tril) for factor in self._modes)

    @property
    @retells
    def channel_scale_tril(self) -> Tensor | None:
        """Cholesky factor of the channels, or None. Of a singular ``channel_covariance`` it is an error."""
        return next((self._batched(factor.scale_tril) for factor in self._channels), None)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """What every argument that the law was made from satisfies; a sequence, each of its tensors."""
        listed: dict[str, constraints.Constraint] = {"loc": self.support}
        for factor in self._modes[:1]:
            listed["mode_scale_trils" if factor.rooted else "mode_covariances"] = Each(factor.constraint)
        for factor in self._channels:
            listed["channel_scale_tril" if factor.rooted else "channel_covariance"] = factor.constraint
        return listed

    @property
    def support(self) -> constraints.Constraint:
        """All real tensors of the event shape."""
        return constraints.independent(constraints.real, len(self._event_shape))

    @property
    def mean(self) -> Tensor:
        """Mean, which is ``loc``."""
        return self.loc

    @property
    def mode(self) -> Tensor:
        """Point of highest density, which is ``loc``; the modes of the tensor are counted by ``order``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Variance of every entry, ``(*batch, *event)``: the products of the diagonals."""
        diagonals = [factor.covariance.diagonal(dim1=-2, dim2=-1) for factor in self._factors]
        return outer_product(diagonals).expand(self._batch_shape + self._event_shape)

    @property
    @retells
    def covariance_matrix(self) -> Tensor:
        """Dense covariance of the row-major flattening of the event, for small events.

        It is ``torch.kron`` of all factors in order, the channels last, for every batch element. Above
        2**24 entries it is refused with a `ShapeError`.
        """
        return self._batched(dense_kronecker([factor.covariance for factor in self._factors]))

    def rsample(self, sample_shape: Size = ()) -> Tensor:
        """Draw samples that carry gradients to ``loc`` and to the factors.

        Args:
            sample_shape: Shape of the set of independent samples.

        Returns:
            Samples ``(*sample_shape, *batch, *event)``.
        """
        ranks = torch.Size(factor.root.shape[-1] for factor in self._factors)
        shape = torch.Size(sample_shape) + self._batch_shape + ranks
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self._along(
            [functools.partial(torch.matmul, other=factor.root.mT) for factor in self._factors], noise
        )

    @retells
    def log_prob(self, value: Tensor) -> Tensor:
        r"""Return the log-density, at the cost of N + 1 triangular solves along the modes.

        .. math:: -\tfrac12 \|(x - \mathrm{loc}) \times_1 L_1^{-1} \cdots \times_{N+1} L_c^{-1}\|^2
            - \tfrac P2 \log 2\pi - \sum_m \tfrac{P}{n_m} \log \det L_m

        where :math:`P` counts the entries of the event and the sum includes the channels.

        Args:
            value: Tensors ``(*sample, *batch, *event)``.

        Returns:
            Log-densities ``(*sample, *batch)``.

        Raises:
            ShapeError: If sizes or batch dimensions of ``value`` disagree with the law.
            DtypeError: If ``value`` has a wider type than the law.
            OptionError: If ``value`` has a NaN, or a factor is singular.
        """
        if self._validate_args:
            self._validate_sample(value)
        roots = self._definite_roots()
        white = self._along([functools.partial(_solve, root) for root in roots], value - self.loc)
        distance = white.square().sum(tuple(range(-len(roots), 0)))
        constant = self._event_shape.numel() * math.log(2 * math.pi)
        return -(distance + constant) / 2 - self._log_volume(roots)

    @retells
    def entropy(self) -> Tensor:
        """Return the differential entropy.

        Returns:
            Entropies ``(*batch)``.

        Raises:
            OptionError: If a factor is singular.
        """
        constant = self._event_shape.numel() * (1 + math.log(2 * math.pi)) / 2
        return (constant + self._log_volume(self._definite_roots())).expand(self._batch_shape)

    def __repr__(self) -> str:
        sizes = tuple(factor.size for factor in self._modes)
        channels = "".join(f", channels={factor.size}" for factor in self._channels)
        return f"{type(self).__name__}(batch={tuple(self._batch_shape)}, modes={sizes}{channels})"

    @property
    def _factors(self) -> tuple[Factor, ...]:
        """One factor an event dimension."""
        return self._modes + self._channels

    def _batched(self, matrix: Tensor) -> Tensor:
        """Expand a matrix to the batch shape."""
        return matrix.expand(self._batch_shape + matrix.shape[-2:])

    def _along(self, maps: Sequence[Callable[[Tensor], Tensor]], tensor: Tensor) -> Tensor:
        """Apply one linear map an event dimension."""
        sizes = {"event_dims": len(maps), "batch_dims": len(self._batch_shape)}
        for dim, linear in enumerate(maps):
            tensor = apply_along(linear, tensor, dim, **sizes)
        return tensor

    def _definite_roots(self) -> list[Tensor]:
        """Return the Cholesky factors, or refuse the first singular one."""
        return [factor.definite_root("the law has no density") for factor in self._factors]

    def _log_volume(self, roots: Sequence[Tensor]) -> Tensor:
        """Return half the log-determinant of the covariance."""
        count = self._event_shape.numel()
        logs = [root.diagonal(dim1=-2, dim2=-1).log().sum(-1) * (count // root.shape[-1]) for root in roots]
        return functools.reduce(torch.add, logs)

    def _validate_sample(self, value: Tensor) -> None:
        """Refuse a value that is not a tensor of this law."""
        check_tensor("value", value)
        if torch.promote_types(value.dtype, self.loc.dtype) != self.loc.dtype:
            raise DtypeError(f"value is {value.dtype} but loc is {self.loc.dtype}.")
        sizes = [("loc", size) for size in self._event_shape]
        batch = check_event("value", value, sizes, self.order)
        check_batches([("value", batch), ("loc", self._batch_shape)])
        check_numbers("value", value)


def _solve(root: Tensor, rows: Tensor) -> Tensor:
    """Map every row by the inverse of a lower triangular matrix."""
    return torch.linalg.solve_triangular(root, rows.mT, upper=False).mT
