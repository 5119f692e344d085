"""The formula of every operator, one record each: its options, and the steps that it takes.

An operator that attends to means is data, the means that it takes and its softmaxes; the others say their steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tensorattn.contraction_tree import Family, Kept, main_effects
from tensorattn.cost.case import Case
from tensorattn.cost.layer import Layer, Means
from tensorattn.cost.products import Tokens, along_mode, attention, product
from tensorattn.cost.steps import accumulate, averages, elementwise, outer_sum
from tensorattn.cost.tape import Tape, Value
from tensorattn.errors import OptionError
from tensorattn.truncation import counting_numbers, kept_family

__all__ = ["FORMULAS", "Formula"]


@dataclass(frozen=True)
class Formula:
    """How the cost of an operator is known.

    Attributes:
        steps: Adds its steps to a layer, and returns the result.
        options: Names of its options with their defaults.
        query: What it takes as queries: any ``positions``, or the ``grid`` of the keys.
        pools: Whether each mode can have linear maps of its own.
    """

    steps: Callable[[Layer], Value]
    options: Mapping[str, Any] = field(default_factory=dict)
    query: Literal["positions", "grid"] = "positions"
    pools: bool = False


def _check(name: str, value: Any, *known: Any) -> None:
    """Check an option that has few values."""
    if value not in known:
        raise OptionError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}.")


def _additive(case: Case) -> list[Family]:
    """Return one softmax a mode, and the grand mean."""
    return _one_each(counting_numbers(main_effects(case.order)))


def _truncated(case: Case) -> list[Family]:
    """Return one softmax for each subset that counts, of those kept and below."""
    return _one_each(counting_numbers(kept_family(case.order, case.options["kept"], case.options["interaction_order"])))


def _one_each(counts: Mapping[Kept, int]) -> list[Family]:
    """Return one softmax for each subset that counts."""
    return [(kept,) for kept, count in counts.items() if count]


def _kao_kv(case: Case) -> list[Family]:
    """Return one softmax for all modes together."""
    return [main_effects(case.order)]


def _flattened(case: Case) -> list[Family]:
    """Return one softmax over all positions."""
    return [(tuple(range(case.order)),)]


def _from_positions(softmaxes_of: Callable[[Case], list[Family]]) -> Callable[[Layer], Value]:
    """Return the steps of an operator that attends from every position to means, some of which share a softmax."""

    def steps(layer: Layer) -> Value:
        case, softmaxes = layer.case, softmaxes_of(layer.case)
        own, corrected = case.options.get("include_self", False), _corrects(case)
        kept = tuple(subset for family in softmaxes for subset in family)
        family = (*kept, ()) if corrected and () not in kept else kept
        means = layer.summary(family, second_moment=corrected)
        absorbed = case.absorbs(kept) and not own and not corrected
        means = layer.absorbed(means) if absorbed else means
        groups = [means.tokens(case, together) for together in softmaxes]

        def attend(tape: Tape, positions: Sequence[Value], count: int) -> Value:
            query, *own_token = positions
            scattered = case.scattered or (absorbed and case.channels_first)
            copies = query.bytes if scattered else 0
            output = attention(tape, query, groups, case.head_dim, written_out=own, copies=copies, chunked=scattered)
            if corrected:
                output = _corrected(case, tape, query, output, means, kept, count)
            if not own:
                return output
            values = (output, query, *own_token)
            return elementwise(tape, *values, flops=4, keeps=values, scratch=5 * output.bytes // 2)

        return layer.attended(attend, with_own_token=own, absorbed=absorbed)

    return steps


def _corrects(case: Case) -> bool:
    """Tell whether the interaction correction is asked for."""
    interaction = case.options.get("interaction")
    _check("interaction", interaction, None, "linear")
    return interaction is not None


def _missing(case: Case, tape: Tape, means: Means, kept: Family, wanted: int, times: int = 1) -> list[Value]:
    """Take away from second moments what the means have among themselves."""
    nonempty = tuple(subset for subset in kept if subset)
    size = case.batch * case.heads * case.head_dim**2
    flops = times * 2 * case.tokens(nonempty) * size
    missing = []
    for moment, values in list(zip(means.moments, (means.values, means.keys), strict=True))[:wanted]:
        operands = [part[subset] for subset in (*nonempty, ()) for part in (values, means.keys)]
        missing.append(product(tape, (*operands, moment), flops, size, "moments"))
    return missing


def _corrected(case: Case, tape: Tape, query: Value, output: Value, means: Means, kept: Family, count: int) -> Value:
    """Add the first order of what the means do not see, which every slab works out for itself."""
    wanted = 1 + (case.options["saturation"] is not None or case.options["include_self"])
    flops = 2 * query.elements * case.head_dim
    missing = _missing(case, tape, means, kept, wanted, count)
    terms = [product(tape, (query, moment), flops, query.elements, "attention") for moment in missing]
    return elementwise(tape, output, *terms, flops=2 * wanted, keeps=terms if wanted > 1 else ())


def _kao_qkv(layer: Layer) -> Value:
    """Attend from means to means, and add up the modes."""
    case, tape, centered, corrected = layer.case, layer.tape, layer.case.options["centered"], _corrects(layer.case)
    if corrected and not centered:
        raise OptionError("interaction needs centered=True: the published form has no first order to correct.")
    modes = main_effects(case.order)
    family = (*modes, ()) if centered else modes
    means = layer.summary(family, second_moment=corrected)
    whole = layer.projected(layer.query) if corrected or not case.module else None
    queries = layer.mapped(means.given) if whole is None else averages(tape, case, whole, family)
    softmaxes: list[Family] = _one_each(counting_numbers(modes)) if centered else [modes]
    groups = [means.tokens(case, together) for together in softmaxes]
    outputs = [attention(tape, queries[kept], groups, case.head_dim) for kept in (family if centered else modes)]
    if centered:
        outputs = [elementwise(tape, outputs[0], outputs.pop()), *outputs[1:]]
    if whole is None or not corrected:
        return layer.summed(outputs)
    total = outer_sum(tape, case, outputs, skip=None, out=False)
    additive = outer_sum(tape, case, list(queries.values()), skip=None, out=False)
    own, flops = elementwise(tape, whole, additive), 2 * whole.elements * case.head_dim
    wanted = 1 + (case.options["saturation"] is not None)
    missing = _missing(case, tape, means, modes, wanted)
    terms = [
        product(tape, (side, moment), flops, whole.elements, "attention")
        for pair in zip(means.moments[:wanted], missing, strict=True)
        for side, moment in zip((own, additive), pair, strict=True)
    ]
    return layer.finished(
        elementwise(tape, total, *terms, flops=2 * len(terms), keeps=terms, scratch=total.bytes), joined=False
    )


def _mode_matrices(layer: Layer) -> list[Value]:
    """Make one attention matrix a mode from pooled queries and keys."""
    case = layer.case
    _check("pool", case.options["pool"], "mean", "sum")
    queries, keys = layer.pooled(main_effects(case.order))
    rows = [case.batch * case.heads * size for size in case.sizes]
    return [
        product(layer.tape, pair, 2 * count * size * case.head_dim, count * size, "attention")
        for pair, count, size in zip(zip(queries.values(), keys.values(), strict=True), rows, case.sizes, strict=True)
    ]


def _kronecker_product(layer: Layer) -> Value:
    """Apply the matrix of each mode in turn to the values."""
    case, matrices = layer.case, _mode_matrices(layer)
    output = layer.projected(layer.value)
    for mode, matrix in enumerate(matrices):
        copied = (case.heads_interleaved or case.scattered) and mode == 0 and (case.order > 1 or case.batch > 1)
        output = along_mode(layer.tape, case, output, matrix, mode, copied=copied)
    return layer.finished(output, joined=not case.heads_interleaved)


def _kronecker_sum(layer: Layer) -> Value:
    """Apply the matrix of each mode to the values, and add up."""
    case, matrices = layer.case, _mode_matrices(layer)
    value, total = layer.projected(layer.value), None
    for mode, matrix in enumerate(matrices):
        copied = case.scattered and mode < case.order - 1
        if case.heads_interleaved:
            copied = mode < case.order - 1 or case.batch > 1
        part = along_mode(layer.tape, case, value, matrix, mode, copied=copied)
        if total is None:
            total = part
        else:
            accumulate(layer.tape, total, part)
    assert total is not None
    return layer.finished(total, joined=not case.heads_interleaved)


def _axial(layer: Layer) -> Value:
    """Attend along each mode with all others as batch, and take the mean."""
    case = layer.case
    query, key, value = (layer.projected(each) for each in (layer.query, layer.key, layer.value))
    outputs = []
    for mode, size in enumerate(case.sizes):
        # The kernel takes two batch dimensions: all but the last of the others are joined, where they lie apart by
        # a copy.
        together = mode >= case.order - 2 and not case.scattered
        if case.heads_interleaved:
            together = case.order < 3 and case.batch == 1
        copies = 0 if together or case.order == 1 else query.bytes + key.bytes + value.bytes
        fibres = Tokens(size, (key,), (value,))
        outputs.append(attention(layer.tape, query, [fibres], case.head_dim, copies=copies))
    scratch = query.bytes if case.order > 1 else 0
    return layer.finished(elementwise(layer.tape, *outputs, flops=case.order, scratch=scratch), joined=False)


MEANS_OPTIONS = {"interaction": None, "saturation": 1.0, "include_self": False}

FORMULAS = {
    "additive": Formula(_from_positions(_additive), MEANS_OPTIONS),
    "truncated": Formula(_from_positions(_truncated), {"kept": None, "interaction_order": None, **MEANS_OPTIONS}),
    "kao_kv": Formula(_from_positions(_kao_kv)),
    "kao_qkv": Formula(_kao_qkv, {"centered": False, "interaction": None, "saturation": 1.0}, query="grid"),
    "kronecker_product": Formula(_kronecker_product, {"pool": "mean"}, query="grid", pools=True),
    "kronecker_sum": Formula(_kronecker_sum, {"pool": "mean"}, query="grid", pools=True),
    "axial": Formula(_axial, query="grid"),
    "flattened": Formula(_from_positions(_flattened)),
}
