r"""The tensor-normal law, Gaussian tensors whose covariance is a Kronecker product, and the laws of its averages.

A marginal mean keeps a subset :math:`U` of the modes and averages over the others with weights that sum to one. It is
linear in the tensor, mode by mode, so it is Gaussian and its covariance is a Kronecker product again. What a mode
with covariance :math:`\Sigma_m` and weights :math:`w_m` contributes to the covariance of two marginal means is

.. math:: M_m = \begin{cases} \Sigma_m & m \text{ kept by both} \\ \Sigma_m w_m & \text{only by the first} \\
    w_m^\top \Sigma_m & \text{only by the second} \\ w_m^\top \Sigma_m w_m & \text{by neither.} \end{cases}
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from tensorattn.diagnose.covariance import Each, Factor, Given, check_tensor, dense_kronecker
from tensorattn.errors import (
    DtypeError,
    ModesError,
    OptionError,
    ShapeError,
    TensorAttentionError,
    WeightsError,
    retells,
)
from tensorattn.masks import beside, broadcasts_to

__all__ = [
    "CrossCovariance",
    "TensorNormal",
    "additive_mean_law",
    "gls_weights",
    "marginal_cross_covariance",
    "marginal_mean_law",
]

Size = torch.Size | Sequence[int]
Weights = Sequence[Tensor | None] | None


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
            modes = _given_modes(mode_covariances, mode_scale_trils)
            channels = _given_channels(channel_covariance, channel_scale_tril)
            batch_shape = _check_shapes(loc, modes, channels)
            if validating:
                _check_numbers("loc", loc)
                for given in (*modes, *channels):
                    given.check_values()
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
        if not broadcasts_to(self._batch_shape, shape):
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
        for mode in self._modes[:1]:
            listed[mode.given.name.partition("[")[0]] = Each(mode.given.constraint)
        for channels in self._channels:
            listed[channels.given.name] = channels.given.constraint
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
        return functools.reduce(torch.mul, _over_event(diagonals)).expand(self._batch_shape + self._event_shape)

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
        for dim, factor in enumerate(self._factors):
            noise = self._along(dim, factor.root, noise)
        return self.loc + noise

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
        white = value - self.loc
        for dim, root in enumerate(roots):
            white = self._along(dim, root, white, inverse=True)
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
        sizes = tuple(self._event_shape[: self.order])
        channels = "".join(f", channels={size}" for size in self._event_shape[self.order :])
        return f"{type(self).__name__}(batch={tuple(self._batch_shape)}, modes={sizes}{channels})"

    @property
    def _factors(self) -> tuple[Factor, ...]:
        """One factor an event dimension."""
        return self._modes + self._channels

    def _batched(self, matrix: Tensor) -> Tensor:
        """Expand a matrix to the batch shape."""
        return matrix.expand(self._batch_shape + matrix.shape[-2:])

    def _along(self, dim: int, matrix: Tensor, tensor: Tensor, *, inverse: bool = False) -> Tensor:
        """Multiply an event dimension of ``(*sample, *batch, *event)`` by a matrix, or by the inverse of a root.

        Samples are columns beside the other dimensions: a batch of matrices is never repeated for every sample.
        """
        first = tensor.dim() - len(self._factors)
        batch, target = list(range(first - len(self._batch_shape), first)), first + dim
        layout = [*batch, target, *(d for d in range(tensor.dim()) if d not in batch and d != target)]
        moved = tensor.permute(layout)  # (*batch, r, *sample, *others)
        columns = moved.reshape(*moved.shape[: len(batch) + 1], moved.shape[len(batch) + 1 :].numel())
        result = torch.linalg.solve_triangular(matrix, columns, upper=False) if inverse else matrix @ columns
        shape = (*moved.shape[: len(batch)], result.shape[-2], *moved.shape[len(batch) + 1 :])
        return result.reshape(shape).permute([layout.index(d) for d in range(tensor.dim())])

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
        batch = _check_event("value", value, sizes, self.order)
        _check_batches([("value", batch), ("loc", self._batch_shape)])
        _check_numbers("value", value)


@dataclass(frozen=True, eq=False)
class CrossCovariance:
    r"""Covariance of two marginal means, :math:`M_1 \otimes \dots \otimes M_N \otimes \Sigma_c`.

    Attributes:
        mode_factors: One matrix :math:`M_m` a mode, ``(*batch, p_m, q_m)``; an averaged mode has size 1 on its side.
        channel_factor: Covariance of the channels ``(*batch, D, D)``, or None.

    Examples:
        >>> import torch, tensorattn as ta
        >>> law = ta.TensorNormal(torch.zeros(2, 3), [torch.eye(2), torch.eye(3)])
        >>> [tuple(factor.shape) for factor in ta.marginal_cross_covariance(law, (0,), (1,)).mode_factors]
        [(2, 1), (1, 3)]
    """

    mode_factors: tuple[Tensor, ...]
    channel_factor: Tensor | None

    @retells
    def to_dense(self) -> Tensor:
        """Multiply the factors out, for small means.

        Returns:
            The covariance of both means, flattened row-major: ``(*batch, p, q)``.

        Raises:
            ShapeError: If it would have more than 2**24 entries.
        """
        channels = () if self.channel_factor is None else (self.channel_factor,)
        return dense_kronecker([*self.mode_factors, *channels])


@retells
def marginal_mean_law(distribution: TensorNormal, kept: Sequence[int], *, weights: Weights = None) -> TensorNormal:
    r"""Return the law of the marginal mean that keeps some modes and averages over the others.

    The law is tensor-normal again. Its mean is the marginal mean of ``loc``, and its covariance

    .. math:: \Big(\prod_{l \notin U} w_l^\top \Sigma_l w_l\Big) \bigotimes_{m \in U} \Sigma_m \otimes \Sigma_c .

    With equal weights the scalar is :math:`\prod_l 1^\top \Sigma_l 1 / n_l^2`; it multiplies the first factor left.

    Args:
        distribution: Law of the tensor.
        kept: Modes to keep, a set of indices, negative ones from the end. None, ``()``, is the grand mean.
        weights: One vector a mode, or None for equal weights. Every vector is divided by its sum, and may have
            negative entries, as the weights of generalised least squares do.

    Returns:
        Law with event :math:`(n_{m \in U}, D)` in mode order. The grand mean of a law without channels has event
        :math:`(1)`.

    Raises:
        ModesError: If ``kept`` has a mode that does not exist, or one twice.
        WeightsError: If weights have the wrong length, are not finite or sum to zero.
        ShapeError: If batch dimensions of weights do not broadcast with those of the law.

    Examples:
        >>> law = TensorNormal(torch.zeros(4, 5, 2), [torch.eye(4), torch.ones(5, 5)], torch.eye(2))
        >>> rows, columns = marginal_mean_law(law, (0,)), marginal_mean_law(law, (1,))
        >>> rows.event_shape, rows.variance[0]
        (torch.Size([4, 2]), tensor([1., 1.]))
        >>> columns.event_shape, columns.variance[0]  # four independent rows are averaged
        (torch.Size([5, 2]), tensor([0.2500, 0.2500]))
    """
    modes = _kept("kept", kept, distribution.order)
    vectors = _law_weights(distribution, weights)
    batch = torch.broadcast_shapes(distribution.batch_shape, *(vector.shape[:-1] for vector in vectors))
    views = _over_event(vectors, len(distribution._channels))
    loc, scale = distribution.loc.expand(batch + distribution.event_shape), distribution.loc.new_ones(())
    for mode, (factor, vector) in enumerate(zip(distribution._modes, vectors, strict=True)):
        if mode not in modes:
            loc = (loc * views[mode]).sum(mode - len(distribution.event_shape), keepdim=True)
            scale = scale * (factor.root.mT @ vector.unsqueeze(-1)).square().sum((-2, -1))  # wᵀΣw, never negative
    factors = [*(distribution._modes[mode] for mode in modes), *distribution._channels]
    matrices = [factor.covariance for factor in factors] or [loc.new_ones(1, 1)]
    matrices[0] = matrices[0] * scale[..., None, None]
    event = [matrix.shape[-1] for matrix in matrices]
    channels = matrices.pop() if distribution._channels else None
    return TensorNormal(loc.reshape(*batch, *event), matrices, channels, validate_args=distribution._validate_args)


@retells
def marginal_cross_covariance(
    distribution: TensorNormal, kept_a: Sequence[int], kept_b: Sequence[int], *, weights: Weights = None
) -> CrossCovariance:
    r"""Return the covariance of two marginal means of the same tensor.

    It is :math:`M_1 \otimes \dots \otimes M_N \otimes \Sigma_c` with the matrices of the table above:
    :math:`\Sigma_m` where both keep the mode, :math:`\Sigma_m w_m` or :math:`w_m^\top \Sigma_m` where one does,
    :math:`w_m^\top \Sigma_m w_m` where neither does. For the averages of two modes :math:`m \ne l`, equal weights:

    .. math:: \tfrac{1}{n_m} \Sigma_m 1 \, \big(\tfrac{1}{n_l} \Sigma_l 1\big)^\top
        \prod_{o \ne m, l} \tfrac{1}{n_o^2} 1^\top \Sigma_o 1 \otimes \Sigma_c .

    Args:
        distribution: Law of the tensor.
        kept_a: Modes that the first mean keeps.
        kept_b: Modes that the second mean keeps.
        weights: As in `marginal_mean_law`, the same for both means.

    Returns:
        The factors, which ``to_dense()`` multiplies out.

    Raises:
        ModesError: If a mode is kept that does not exist, or one twice.
        WeightsError: If weights have the wrong length, are not finite or sum to zero.
        ShapeError: If batch dimensions of weights do not broadcast with those of the law.

    Examples:
        >>> law = TensorNormal(torch.zeros(2, 3), [torch.eye(2), torch.eye(3)])
        >>> marginal_cross_covariance(law, (0,), (1,)).to_dense()  # all entries 1 / 6
        tensor([[0.1667, 0.1667, 0.1667],
                [0.1667, 0.1667, 0.1667]])
    """
    first = _kept("kept_a", kept_a, distribution.order)
    second = _kept("kept_b", kept_b, distribution.order)
    matrices = []
    vectors = _law_weights(distribution, weights)
    for mode, (factor, vector) in enumerate(zip(distribution._modes, vectors, strict=True)):
        row = vector.unsqueeze(-2)
        matrix = factor.covariance if mode in first else row @ factor.covariance
        matrices.append(matrix if mode in second else matrix @ row.mT)
    return CrossCovariance(tuple(matrices), distribution.channel_covariance)


@retells
def additive_mean_law(effects: Sequence[Tensor], kept: Sequence[int], *, weights: Weights = None) -> Tensor:
    r"""Return the expected marginal mean of a tensor whose mean is additive over the modes.

    If :math:`\mathbb E\, x_j = \sum_m a^m[j_m]`, the effects of the kept modes stay and those of the others are
    averaged. Nothing of the size of the tensor is formed:

    .. math:: \mathbb E\, \bar x^U[j_U] = \sum_{m \in U} a^m[j_m] + \sum_{l \notin U} w_l^\top a^l .

    Args:
        effects: The effects :math:`a^m`, one tensor a mode.
        kept: Modes to keep, a set of indices. One mode is a mode average, ``()`` the grand mean.
        weights: As in `marginal_mean_law`.

    Returns:
        The expected marginal mean, kept modes in mode order.

    Raises:
        ShapeError: If an effect has fewer than two dimensions, or channels or batch dimensions disagree.
        DtypeError: If an effect is not of type float32 or float64.
        ModesError: If a mode is kept that does not exist, or one twice.
        WeightsError: If weights have the wrong length, are not finite or sum to zero.

    Shape:
        - effects[m]: :math:`(*, n_m, D)`, batch dimensions :math:`*` broadcast
        - result: :math:`(*, n_{m \in U}, D)`

    Examples:
        >>> rows, columns = torch.tensor([[10.0], [20.0]]), torch.tensor([[1.0], [2.0], [3.0]])
        >>> additive_mean_law([rows, columns], (0,))[..., 0]
        tensor([12., 22.])
    """
    modes = _kept("kept", kept, len(effects))
    batches = _check_effects(effects)
    vectors = _normalized(weights, [effect.shape[-2] for effect in effects], effects[0], batches)
    terms = []
    for mode, (effect, vector) in enumerate(zip(effects, vectors, strict=True)):
        term = effect if mode in modes else vector.unsqueeze(-2) @ effect  # (*batch, n or 1, D)
        sizes = [term.shape[-2] if other == mode else 1 for other in modes]
        terms.append(term.reshape(*term.shape[:-2], *sizes, term.shape[-1]))
    return functools.reduce(torch.add, terms)


@retells
def gls_weights(covariance: Tensor) -> Tensor:
    r"""Return the weights of one mode that average an additive mean with the least variance.

    .. math:: w = \frac{\Sigma^{-1} 1}{1^\top \Sigma^{-1} 1}

    Mode averages with these weights, one vector a mode, are the generalised least squares estimate of an additive
    mean under a tensor-normal law, which is also its maximum likelihood estimate: with :math:`P_m = 1 w_m^\top`, the
    map :math:`\sum_m I \otimes P_{-m} - (N - 1) \bigotimes_m P_m` is the projection on additive tensors that is
    orthogonal in the inverse covariance. Equal weights are optimal exactly if every row of :math:`\Sigma` has the
    same sum. Entries can be negative.

    Args:
        covariance: Positive definite covariance of the mode.

    Returns:
        Weights that sum to one.

    Raises:
        ShapeError: If ``covariance`` is not a square matrix or a batch of them.
        DtypeError: If it is not of type float32 or float64.
        OptionError: If it is not symmetric, not positive semidefinite, or singular.

    Shape:
        - covariance: :math:`(*, n, n)`
        - result: :math:`(*, n)`

    Examples:
        >>> gls_weights(torch.diag(torch.tensor([1.0, 1.0, 2.0])))  # half the trust in the noisy one
        tensor([0.4000, 0.4000, 0.2000])
    """
    given = Given("covariance", covariance)
    given.check_shape()
    given.check_values()
    root = given.factor().definite_root("it has no inverse")
    solution = torch.cholesky_solve(covariance.new_ones(covariance.shape[-1], 1), root).squeeze(-1)
    return solution / solution.sum(-1, keepdim=True)


def _over_event(vectors: Sequence[Tensor], channels: int = 0) -> list[Tensor]:
    """View vectors ``(*batch, n_k)``, one an event dimension, so that they broadcast to the event."""
    return [beside(vector, dim, len(vectors) + channels) for dim, vector in enumerate(vectors)]


def _kept(argument: str, kept: Sequence[int], order: int) -> tuple[int, ...]:
    """Read a set of modes, in mode order."""
    if not isinstance(kept, Iterable):
        raise ModesError(f"{argument} is {kept!r}, but a sequence of modes is needed.")
    for mode in kept:
        if not isinstance(mode, int) or not -order <= mode < order:
            raise ModesError(f"{argument} has mode {mode!r}, but there are {order} modes.")
    modes = [mode % order for mode in kept]
    for mode in modes:
        if modes.count(mode) > 1:
            raise ModesError(f"{argument} has mode {mode} {modes.count(mode)} times, but once is enough.")
    return tuple(sorted(modes))


def _law_weights(distribution: TensorNormal, weights: Weights) -> list[Tensor]:
    """Normalise the weights of the modes of a law."""
    sizes = distribution.event_shape[: distribution.order]
    return _normalized(weights, sizes, distribution.loc, [("loc", distribution.batch_shape)])


def _normalized(
    weights: Weights, sizes: Sequence[int], like: Tensor, batches: Sequence[tuple[str, torch.Size]]
) -> list[Tensor]:
    """Check the weights of every mode and divide them by their sums, ``(*batch, n_m)`` each."""
    given = [None] * len(sizes) if weights is None else list(weights)
    if len(given) != len(sizes):
        raise WeightsError(f"weights has {len(given)} vectors, but there are {len(sizes)} modes.")
    vectors, seen = [], list(batches)
    for mode, (vector, size) in enumerate(zip(given, sizes, strict=True)):
        if vector is None:
            vectors.append(like.new_full((size,), 1 / size))
            continue
        name = f"weights[{mode}]"
        if vector.dim() < 1 or vector.shape[-1] != size:
            raise WeightsError(f"{name} has shape {tuple(vector.shape)}, but mode {mode} has size {size}.")
        seen.append((name, vector.shape[:-1]))
        vector = vector.to(like)
        total = vector.sum(-1, keepdim=True)
        if not bool(torch.isfinite(vector).all()):
            raise WeightsError(f"{name} has an entry that is not finite.")
        if bool((total == 0).any()):
            raise WeightsError(f"{name} sums to 0, so it has no average.")
        vectors.append(vector / total)
    _check_batches(seen)
    return vectors


def _check_effects(effects: Sequence[Tensor]) -> list[tuple[str, torch.Size]]:
    """Check that effects belong together, and return their batch shapes by name."""
    if len(effects) == 0:
        raise ShapeError("effects is empty, but every mode needs one.")
    for mode, effect in enumerate(effects):
        name = f"effects[{mode}]"
        check_tensor(name, effect)
        if effect.dim() < 2:
            raise ShapeError(f"{name} has shape {tuple(effect.shape)}, but (*batch, n_{mode}, D) is needed.")
        if effect.shape[-1] != effects[0].shape[-1]:
            raise ShapeError(f"channels are {effects[0].shape[-1]} in effects[0] but {effect.shape[-1]} in {name}.")
        if effect.dtype != effects[0].dtype:
            raise DtypeError(f"effects[0] is {effects[0].dtype} but {name} is {effect.dtype}.")
    return [(f"effects[{mode}]", effect.shape[:-2]) for mode, effect in enumerate(effects)]


def _given_modes(covariances: Sequence[Tensor] | None, scale_trils: Sequence[Tensor] | None) -> list[Given]:
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


def _given_channels(covariance: Tensor | None, scale_tril: Tensor | None) -> list[Given]:
    """Name the matrix of the channels, if there is one."""
    if covariance is not None and scale_tril is not None:
        raise OptionError("channel_covariance and channel_scale_tril are both given, but one says it all.")
    if covariance is not None:
        return [Given("channel_covariance", covariance)]
    return [] if scale_tril is None else [Given("channel_scale_tril", scale_tril, rooted=True)]


def _check_shapes(loc: Tensor, modes: Sequence[Given], channels: Sequence[Given]) -> torch.Size:
    """Check that the arguments of a law belong together, and return its batch shape."""
    factors = [*modes, *channels]
    if not factors:
        raise ModesError("mode_covariances is empty and there are no channels, so the event has no dimension.")
    check_tensor("loc", loc)
    for given in factors:
        given.check_shape()
        if given.matrix.dtype != loc.dtype:
            raise DtypeError(f"loc is {loc.dtype} but {given.name} is {given.matrix.dtype}.")
    sizes = [(given.name, given.matrix.shape[-1]) for given in factors]
    hint = "" if channels else "Without a channel factor the event is (n_1, ..., n_N): the last dimension is a mode."
    batch = _check_event("loc", loc, sizes, len(modes), hint)
    batches = [("loc", batch), *((given.name, given.matrix.shape[:-2]) for given in factors)]
    _check_batches(batches)
    return torch.broadcast_shapes(*(shape for _, shape in batches))


def _check_event(name: str, tensor: Tensor, sizes: Sequence[tuple[str, int]], order: int, hint: str = "") -> torch.Size:
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


def _check_batches(batches: Sequence[tuple[str, torch.Size]]) -> None:
    """Check that batch shapes broadcast, and name the first two that do not."""
    for (name, shape), (other, other_shape) in itertools.combinations(batches, 2):
        if not _broadcast(shape, other_shape):
            raise ShapeError(
                f"batch dimensions are {tuple(shape)} in {name} but {tuple(other_shape)} in {other}, "
                "which do not broadcast."
            )


def _broadcast(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Tell whether two shapes broadcast."""
    return all(size == second or 1 in (size, second) for size, second in zip(shape[::-1], other[::-1], strict=False))


def _check_numbers(name: str, tensor: Tensor) -> None:
    """Check that a tensor has no NaN."""
    if bool(tensor.isnan().any()):
        raise OptionError(f"{name} has a NaN.")
