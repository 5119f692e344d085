r"""Laws of averages: how marginal means of a tensor-normal tensor are distributed, exactly.

A marginal mean keeps a subset :math:`U` of the modes and averages over the others with weights that sum to one. It is
linear in the tensor, mode by mode, so it is Gaussian and its covariance is a Kronecker product again. What a mode
with covariance :math:`\Sigma_m` and weights :math:`w_m` contributes to the covariance of two marginal means is

.. math:: M_m = \begin{cases} \Sigma_m & m \text{ kept by both} \\ \Sigma_m w_m & \text{only by the first} \\
    w_m^\top \Sigma_m & \text{only by the second} \\ w_m^\top \Sigma_m w_m & \text{by neither.} \end{cases}
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorattn.errors import DtypeError, ModesError, ShapeError, WeightsError, retells
from tensorattn.stats._arguments import Given, check_batches, check_matrix, check_tensor
from tensorattn.stats._kronecker import apply_along, dense_kronecker
from tensorattn.stats.tensor_normal import TensorNormal

__all__ = [
    "CrossCovariance",
    "additive_mean_law",
    "gls_weights",
    "marginal_cross_covariance",
    "marginal_mean_law",
]

Weights = Sequence[Tensor | None] | None


@dataclass(frozen=True, eq=False)
class CrossCovariance:
    r"""Covariance of two marginal means, :math:`M_1 \otimes \dots \otimes M_N \otimes \Sigma_c`.

    Attributes:
        mode_factors: One matrix :math:`M_m` a mode, ``(*batch, p_m, q_m)``; an averaged mode has size 1 on its side.
        channel_factor: Covariance of the channels ``(*batch, D, D)``, or None.
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
    loc, scale = distribution.loc.expand(batch + distribution.event_shape), distribution.loc.new_ones(())
    for mode, (factor, vector) in enumerate(zip(distribution._modes, vectors, strict=True)):
        if mode not in modes:
            column = vector.unsqueeze(-1)
            average = functools.partial(torch.matmul, other=column)
            loc = apply_along(average, loc, mode, event_dims=len(distribution.event_shape), batch_dims=len(batch))
            scale = scale * (factor.root.mT @ column).square().sum((-2, -1))  # wᵀΣw, never negative
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
    check_matrix("covariance", covariance)
    given = Given("covariance", covariance)
    given.check()
    root = given.factor().definite_root("it has no inverse")
    solution = torch.cholesky_solve(covariance.new_ones(covariance.shape[-1], 1), root).squeeze(-1)
    return solution / solution.sum(-1, keepdim=True)


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
    check_batches(seen)
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
