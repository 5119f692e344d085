"""The cost of an operator from sizes alone: operations, traffic and memory, printed as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorattn.cost.case import Case
from tensorattn.cost.formulas import FORMULAS
from tensorattn.cost.layer import Layer
from tensorattn.cost.tape import Part
from tensorattn.errors import OptionError, retells
from tensorattn.modes import ModeSpec, check_order
from tensorattn.planning import ITEM_SIZES

__all__ = ["Cost", "cost"]

LAYOUTS = ("channels_last", "channels_first")
PRODUCTS = ("projections", "attention", "moments")  # what counters of matrix products see


@dataclass(frozen=True)
class Cost:
    """What one call of an operator costs. Frozen; printing it shows a table.

    Attributes:
        title: What it is the cost of.
        parts: Operations and traffic of each kind of work, forwards and, where asked for, backwards.
        peak: Most bytes held at once beyond what the caller holds: beyond input and parameters, beyond ``out``, and
            in training beyond the gradient of the output. It holds the results themselves, and until the backward
            pass is over all that is kept for it. Buffers inside kernels and libraries are not known and not counted.
        results: Bytes of the results alone: the output, and in training the gradients of inputs and parameters.
    """

    title: str
    parts: tuple[Part, ...]
    peak: int
    results: int

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return sum(part.flops for part in self.parts)

    @property
    def product_flops(self) -> int:
        """Those in matrix products of projections and attention, which is all that most counters see."""
        return sum(part.flops for part in self.parts if part.name in PRODUCTS)

    @property
    def read(self) -> int:
        """Bytes read."""
        return sum(part.read for part in self.parts)

    @property
    def written(self) -> int:
        """Bytes written."""
        return sum(part.written for part in self.parts)

    @property
    def extra(self) -> int:
        """Bytes held at the peak beyond the results."""
        return self.peak - self.results

    def __str__(self) -> str:
        rows = [(f"{part.name}, {part.phase}", part.flops, part.read, part.written) for part in self.parts]
        rows.append(("total", self.flops, self.read, self.written))
        cells = [("", "FLOPs", "bytes read", "bytes written"), *((name, *(f"{n:,}" for n in ns)) for name, *ns in rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        lines = [f"cost of {self.title}"]
        for name, *numbers in cells:
            right = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
            lines.append("  " + "   ".join((name.ljust(widths[0]), *right)))
        lines.append(
            f"peak memory: {self.peak / 1e6:.1f} MB beyond what is given, "
            f"{self.results / 1e6:.1f} MB of it the results and {self.extra / 1e6:.1f} MB extra"
        )
        return "\n".join(lines)


@retells
def cost(
    operator: str,
    sizes: Sequence[int],
    *,
    dim: int,
    batch: int = 1,
    num_heads: int = 1,
    module: bool = True,
    queries: int | None = None,
    skip: bool = False,
    out: bool = False,
    mode_projections: bool = False,
    dtype: str = "float32",
    layout: str = "channels_last",
    backward: bool = False,
    modes: int | str | Sequence[str] | None = None,
    **options: Any,
) -> Cost:
    """Tell what an operator costs, without running it: in its plain form.

    That is without weights or masks, context, position biases, rotary embeddings, norms of queries and keys, causality
    and dropout, and with biases in the linear maps, all of whose parameters are trained where there is a backward pass.

    Matrix products count two operations a multiply-add. Operations in averages, softmaxes, outer sums and elementwise
    functions are counted by formula: one an element read or written, five an element of a softmax. Bytes are those of
    all operands and results of every step, as if nothing stayed in a cache.

    Args:
        operator: Name of the operator.
        sizes: Sizes of the modes ``(n_1, …, n_N)``.
        dim: Channels, all heads together.
        batch: Batch entries.
        num_heads: Number of heads; they divide the channels.
        module: Whether it is `TensorAttention` on one input; if not, the functional form on given queries, keys and
            values, with heads as a batch dimension.
        queries: Queries of a batch entry, in the functional form of operators that take any; those on the grid by
            default.
        skip: Whether the module is given ``skip``.
        out: Whether the module is given ``out``, where the output then takes no memory.
        mode_projections: As in the module.
        dtype: Type of the elements: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        layout: ``"channels_last"`` or ``"channels_first"``, where channels lie before the modes in memory.
        backward: Whether the backward pass is part of it; inputs and parameters all have gradients then.
        modes: Names of the modes, for the title, and in ``kept``.
        **options: Options of the operator.

    Returns:
        The cost.

    Raises:
        OptionError: If there is no such operator or option, or an argument is out of its range or has no meaning.
        ModesError: If ``modes`` does not fit ``sizes``.

    Examples:
        >>> print(cost("kao_qkv", (16, 56, 56), dim=96, num_heads=4, modes="t h w", skip=True))
        cost of kao_qkv, module, skip: batch=1 t=16 h=56 w=56 C=96 heads=4, float32, channels last, 19.3 MB
                                      FLOPs   bytes read   bytes written
          averages, forward      20,213,760   40,427,520       1,597,440
          projections, forward    9,437,184      491,520         196,608
          attention, forward      6,291,456      344,064          49,152
          softmax, forward          327,680            0               0
          outer sum, forward     14,450,688   19,316,736      19,267,584
          total                  50,720,768   60,579,840      21,110,784
        peak memory: 19.3 MB beyond what is given, 19.3 MB of it the results and 0.0 MB extra
    """
    if operator not in FORMULAS:
        raise OptionError(f"no cost formula of operator {operator!r}; there is one of: {', '.join(FORMULAS)}.")
    formula = FORMULAS[operator]
    for name in options:
        if name not in formula.options:
            known = ", ".join(formula.options) or "none"
            raise OptionError(f"operator {operator!r} has no option {name!r}; its options are: {known}.")
    spec = _modes(sizes, modes)
    _check_numbers(sizes, dim, batch, num_heads, queries)
    for name, value, choices in (("dtype", dtype, tuple(ITEM_SIZES)), ("layout", layout, LAYOUTS)):
        if value not in choices:
            raise OptionError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
    if queries is not None and module:
        raise OptionError("queries has no meaning for the module.")
    if queries is not None and formula.query == "grid":
        raise OptionError(f"queries has no meaning for operator {operator!r}: it attends from the grid of the keys.")
    for name, given in (("skip", skip), ("out", out), ("mode_projections", mode_projections)):
        if given and not module:
            raise OptionError(f"{name} has no meaning for the functional form.")
    if mode_projections and not formula.pools:
        raise OptionError(f"mode_projections has no meaning for operator {operator!r}: it does not pool its queries.")
    if out and backward:
        raise OptionError("out has no meaning with backward: no gradient goes through it.")
    if options.get("kept") is not None:
        options["kept"] = tuple(tuple(spec.index(mode) for mode in kept) for kept in options["kept"])
    case = Case(
        sizes=tuple(sizes),
        batch=batch,
        dim=dim,
        heads=num_heads,
        itemsize=ITEM_SIZES[dtype],
        channels_first=layout == "channels_first",
        module=module,
        queries=math.prod(sizes) if queries is None else queries,
        skip=skip,
        out=out,
        mode_projections=mode_projections,
        backward=backward,
        options={**formula.options, **options},
    )
    layer = Layer(case)
    result = formula.steps(layer)
    gradients = layer.given_bytes if backward else 0
    return Cost(
        _title(operator, case, spec, dtype, layout, options),
        layer.tape.parts(result, backward=backward),
        layer.tape.peak(result, backward=backward),
        (0 if result.held else result.bytes) + gradients,
    )


def _modes(sizes: Sequence[int], modes: int | str | Sequence[str] | None) -> ModeSpec:
    """Read the modes of the sizes."""
    check_order(len(sizes), "the number of sizes")
    spec = ModeSpec.parse(len(sizes) if modes is None else modes)
    if spec.order != len(sizes):
        raise OptionError(f"modes names {spec.order} modes, but sizes has {len(sizes)}.")
    return spec


def _check_numbers(sizes: Sequence[int], dim: int, batch: int, num_heads: int, queries: int | None) -> None:
    """Check that all sizes are whole and positive, and that heads divide the channels."""
    given = [("every size", size) for size in sizes]
    given += [("dim", dim), ("batch", batch), ("num_heads", num_heads)]
    given += [] if queries is None else [("queries", queries)]
    for name, number in given:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise OptionError(f"{name} must be a whole number of at least 1, got {number!r}.")
    if dim % num_heads:
        raise OptionError(f"dim must be divisible by num_heads, got {dim} and {num_heads}.")


def _title(operator: str, case: Case, spec: ModeSpec, dtype: str, layout: str, options: Mapping[str, Any]) -> str:
    """Say in one line what the cost is of, with the size of the input or of the keys."""
    grid = " ".join(f"{name}={size}" for name, size in zip(spec.names, case.sizes, strict=True))
    words = [operator, *(f"{name}={value!r}" for name, value in options.items())]
    words.append("module" if case.module else f"function of {case.queries:,} queries")
    words += [word for word in ("skip", "out", "mode_projections") if getattr(case, word)]
    return (
        f"{', '.join(words)}: batch={case.batch} {grid} C={case.dim} heads={case.heads}, {dtype}, "
        f"{layout.replace('_', ' ')}, {case.elements * case.itemsize / 1e6:.1f} MB"
    )
