"""The cost of operators from sizes alone: equal to what is counted on the meta device, close to what is measured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

import tensorattn as ta
from tensorattn import absorbing, contraction, slabs, softmax
from tensorattn.bench.peak import peaks
from tensorattn.bench.workload import Workload
from tensorattn.cost import FORMULAS, products, steps
from tensorattn.cost.tape import Step, Tape, Value
from tensorattn.testing.variants import Variant, variants

BATCH, HEADS, DIM = 2, 3, 12
GRIDS = {"channels_last": [(1,), (1, 4), (4, 5, 3), (2, 3, 1, 2)], "channels_first": [(4, 5, 3)]}
POSITIONS = 64  # of a slab, so that small grids come in several


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the module work on few positions at a time."""
    monkeypatch.setattr(slabs, "POSITIONS", POSITIONS)


@pytest.fixture
def uncounted_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Averages and outer sums contain products with vectors; they are counted by formula."""
    for name in ("run", "run_backwards"):
        function = getattr(contraction, name)

        @functools.wraps(function)
        def uncounted(*given: Any, function: Callable[..., Any] = function, **options: Any) -> Any:
            with _disable_current_modes():
                return function(*given, **options)

        monkeypatch.setattr(contraction, name, uncounted)


def empty(sizes: tuple[int, ...], *batch: int, dim: int, layout: str) -> Tensor:
    """A tensor without values, channels last in its shape."""
    if layout == "channels_first":
        return torch.empty(*batch, dim, *sizes, device="meta").movedim(len(batch), -1)
    return torch.empty(*batch, *sizes, dim, device="meta")


def module_call(
    variant: Variant, sizes: tuple[int, ...], layout: str, dim: int, heads: int, **given: Any
) -> Callable[[Tensor], Tensor]:
    """The module as a function of its input, channels last in its shape."""
    first = layout == "channels_first"
    module = ta.TensorAttention(
        dim, heads, modes=len(sizes), operator=variant.name, channels_first=first, device="meta", **variant.options
    )
    return lambda x: module(x.movedim(-1, 1) if first else x, **given)


def counted(call: Callable[..., Tensor], *tensors: Tensor, backward: bool) -> int:
    """Operations of matrix products, as PyTorch counts them."""
    tensors = tuple(tensor.detach().requires_grad_(backward) for tensor in tensors)
    with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
        output = call(*tensors)
        if backward:
            output.backward(torch.empty_like(output))
    return counter.get_total_flops()


def fits(variant: Variant, sizes: tuple[int, ...]) -> bool:
    """Whether the modes that the options name exist."""
    return max((mode for kept in variant.options.get("kept", ()) for mode in kept), default=0) < len(sizes)


@pytest.fixture
def small_savings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one head absorb its maps in small grids too."""
    monkeypatch.setattr(absorbing, "SAVED", 1)


@pytest.mark.usefixtures("uncounted_averages", "small_slabs", "small_savings")
@pytest.mark.parametrize(("dim", "heads"), [(DIM, HEADS), (DIM, 1), (64, 1)])
@pytest.mark.parametrize("layout", GRIDS)
@pytest.mark.parametrize("variant", variants(), ids=str)
def test_products_are_those_that_are_counted(variant: Variant, layout: str, dim: int, heads: int) -> None:
    for sizes in (sizes for sizes in GRIDS[layout] if fits(variant, sizes)):
        given = {"dim": dim, "batch": BATCH, "num_heads": heads, "layout": layout, **variant.options}
        for backward in (False, True):
            x = empty(sizes, BATCH, dim=dim, layout=layout)
            expected = counted(module_call(variant, sizes, layout, dim, heads), x, backward=backward)
            found = ta.cost(variant.name, sizes, backward=backward, **given)
            assert found.product_flops == expected, f"{found}\nbut {expected:,} are counted"
            split = [empty(sizes, BATCH, heads, dim=dim // heads, layout=layout) for _ in range(3)]
            call = functools.partial(variant.function, order=len(sizes))
            expected = counted(call, *split, backward=backward)
            found = ta.cost(variant.name, sizes, module=False, backward=backward, **given)
            assert found.product_flops == expected, f"{found}\nbut {expected:,} are counted"


@pytest.mark.usefixtures("uncounted_averages")
@pytest.mark.parametrize("name", [name for name in FORMULAS if FORMULAS[name].pools])
def test_maps_of_its_own_for_each_mode_are_counted(name: str) -> None:
    module = ta.TensorAttention(DIM, HEADS, modes=3, operator=name, mode_projections=True, device="meta")
    x = empty((4, 5, 3), BATCH, dim=DIM, layout="channels_last")
    for backward in (False, True):
        found = ta.cost(
            name, (4, 5, 3), dim=DIM, batch=BATCH, num_heads=HEADS, mode_projections=True, backward=backward
        )
        assert found.product_flops == counted(module, x, backward=backward)


@pytest.mark.usefixtures("uncounted_averages")
@pytest.mark.parametrize("name", [name for name in FORMULAS if FORMULAS[name].query == "positions"])
def test_other_queries_are_counted(name: str) -> None:
    key = empty((4, 5), BATCH, HEADS, dim=4, layout="channels_last")
    query = torch.empty(BATCH, HEADS, 7, 4, device="meta")
    for backward in (False, True):
        expected = counted(functools.partial(ta.OPERATORS[name].function, order=2), query, key, key, backward=backward)
        found = ta.cost(name, (4, 5), module=False, queries=7, dim=12, batch=BATCH, num_heads=HEADS, backward=backward)
        assert found.product_flops == expected


def test_every_operator_has_a_formula_with_its_options() -> None:
    assert list(FORMULAS) == list(ta.OPERATORS)
    for name, formula in FORMULAS.items():
        record = ta.OPERATORS[name]
        assert (dict(formula.options), formula.query, formula.pools) == (
            dict(record.options),
            record.query,
            record.pools,
        )


def test_logits_are_those_of_the_code() -> None:
    """The cost knows no tensor, so it has their number a second time."""
    assert products.LOGITS == softmax.CHUNK


# ---- memory --------------------------------------------------------------------------------------------------


def test_what_lives_at_once() -> None:
    """A value of 4 bytes an element goes with its last reader, or with the backward pass that needs it."""
    given, weight = Value(100, 4, held=True), Value(10, 4, held=True)
    tape = Tape()
    first, second = Value(200, 4), Value(50, 4)
    tape.steps.append(Step((given, weight), (first,), keeps=(given,), scratch=40))
    tape.steps.append(Step((first,), (second,), keeps=(first,)))
    assert tape.peak(second, backward=False) == 800 + 200
    # forwards 1000; backwards first the gradient of `first` beside it, then those of what is given, without `first`
    assert tape.peak(second, backward=True) == 800 + 200 + 800
    assert tape.given(second) == (given, weight)


def test_a_sum_passes_its_gradient_on() -> None:
    given = Value(100, 4, held=True)
    tape = Tape()
    result = Value(100, 4)
    tape.steps.append(Step((given,), (result,), passes=(given,)))
    assert tape.peak(result, backward=True) == 400


def test_what_nothing_depends_on_has_no_backward_pass() -> None:
    given, tape = Value(100, 4, held=True), Tape()
    result, unused = Value(100, 4), Value(1000, 4)
    steps.elementwise(tape, given)
    tape.steps.append(Step((given,), (unused,), keeps=(unused,)))
    tape.steps.append(Step((given,), (result,)))
    assert tape.peak(result, backward=True) == 4000 + 0
    assert [part.phase for part in tape.parts(result, backward=True)] == ["forward"]


MEASURED = [
    ("kao_kv", {"backward": True, "skip": True}),
    ("kao_qkv", {"backward": True, "skip": True, "layout": "channels_first"}),
    ("kronecker_sum", {}),
    ("kao_kv", {"sizes": (50, 72, 72), "heads": 1, "layout": "channels_first"}),
]


def test_the_peak_is_close_to_what_is_measured() -> None:
    """Within a tenth, from 64 MB on; each in a process of its own."""
    usual = {"batch": 1, "sizes": (24, 72, 72), "dim": 64}
    jobs = [(name, Workload(**{**usual, **given})) for name, given in MEASURED]
    for (name, work), peak in zip(jobs, peaks(jobs), strict=True):
        assert peak is not None
        if peak.bytes is None:
            pytest.skip("this system does not tell")
        given = {"skip": work.skip, "backward": work.backward, "layout": work.layout}
        cost = ta.cost(name, work.sizes, dim=work.dim, num_heads=work.heads, **given)
        assert peak.bytes > 64e6 and cost.peak == pytest.approx(peak.bytes, rel=0.1), f"{name} on {work}"
        assert cost.results == peak.results - 4 * 4 * work.dim * work.backward  # biases are not counted


# ---- what is printed, and what is refused --------------------------------------------------------------------


def test_a_cost_prints_itself() -> None:
    cost = ta.cost("kao_kv", (8, 4), dim=8, batch=2, num_heads=2, modes="h w", backward=True, dtype="bfloat16")
    assert str(cost).splitlines() == [
        "cost of kao_kv, module: batch=2 h=8 w=4 C=8 heads=2, bfloat16, channels last, 0.0 MB",
        "                            FLOPs   bytes read   bytes written",
        "  averages, forward         2,048        2,048             768",
        "  projections, forward     22,528        4,096           3,584",
        "  attention, forward       24,576        2,560           1,024",
        "  softmax, forward          7,680            0               0",
        "  projections, backward    45,056       11,264           4,096",
        "  attention, backward      49,152        4,608           2,560",
        "  softmax, backward         7,680            0               0",
        "  averages, backward          704          768           1,024",
        "  total                   159,424       25,344          13,056",
        "peak memory: 0.0 MB beyond what is given, 0.0 MB of it the results and 0.0 MB extra",
    ]
    assert cost == ta.cost("kao_kv", [8, 4], dim=8, batch=2, num_heads=2, modes="h w", backward=True, dtype="bfloat16")
    assert len({cost, cost}) == 1
    assert cost.flops == sum(part.flops for part in cost.parts)


def test_memory_counts_what_it_says() -> None:
    """The output of a layer without positions of its own is nearly all of it; into ``out`` there is nothing."""
    given: dict[str, Any] = {"dim": 64, "num_heads": 4}
    fresh = ta.cost("kao_qkv", (64, 64, 64), **given)
    assert fresh.results == 4 * 64**4
    assert 0 <= fresh.extra < 0.05 * fresh.results
    assert ta.cost("kao_qkv", (64, 64, 64), out=True, skip=True, **given).peak < 0.05 * fresh.results
    training = ta.cost("kao_qkv", (64, 64, 64), backward=True, **given)
    assert training.results == 2 * 4 * 64**4 + 4 * 4 * 64**2


REFUSED = [
    (
        ("dense", (3,)),
        {},
        "no cost formula of operator 'dense'; there is one of: " + ", ".join(FORMULAS) + ".",
    ),
    (
        ("kao_kv", (3,)),
        {"centered": True},
        "operator 'kao_kv' has no option 'centered'; its options are: none.",
    ),
    (
        ("kao_qkv", (3,)),
        {"pool": "sum"},
        "operator 'kao_qkv' has no option 'pool'; its options are: centered, interaction, saturation.",
    ),
    (("additive", (3,)), {"interaction": "cubic"}, "interaction must be None or 'linear', got 'cubic'."),
    (("kronecker_sum", (3,)), {"pool": "max"}, "pool must be 'mean' or 'sum', got 'max'."),
    (
        ("kao_qkv", (3,)),
        {"interaction": "linear"},
        "interaction needs centered=True: the published form has no first order to correct.",
    ),
    (("kao_kv", ()), {}, "the number of sizes must be at least 1, got 0."),
    (("kao_kv", (3, 0)), {}, "every size must be a whole number of at least 1, got 0."),
    (("kao_kv", (3, 2.0)), {}, "every size must be a whole number of at least 1, got 2.0."),
    (("kao_kv", (3,)), {"batch": 0}, "batch must be a whole number of at least 1, got 0."),
    (("kao_kv", (3,)), {"num_heads": 3}, "dim must be divisible by num_heads, got 4 and 3."),
    (("kao_kv", (3,)), {"dtype": "int8"}, "dtype must be one of float64, float32, bfloat16, float16, got 'int8'."),
    (("kao_kv", (3,)), {"layout": "nhwc"}, "layout must be one of channels_last, channels_first, got 'nhwc'."),
    (("kao_kv", (3,)), {"modes": "h w"}, "modes names 2 modes, but sizes has 1."),
    (("kao_kv", (3,)), {"queries": 3}, "queries has no meaning for the module."),
    (
        ("axial", (3,)),
        {"queries": 3, "module": False},
        "queries has no meaning for operator 'axial': it attends from the grid of the keys.",
    ),
    (("kao_kv", (3,)), {"skip": True, "module": False}, "skip has no meaning for the functional form."),
    (
        ("kao_kv", (3,)),
        {"mode_projections": True},
        "mode_projections has no meaning for operator 'kao_kv': it does not pool its queries.",
    ),
    (
        ("kao_kv", (3,)),
        {"out": True, "backward": True},
        "out has no meaning with backward: no gradient goes through it.",
    ),
]


@pytest.mark.parametrize(("given", "options", "message"), REFUSED, ids=lambda part: str(part)[:40])
def test_what_has_no_cost_is_refused(given: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ta.TensorAttentionError) as refused:
        ta.cost(*given, **{"dim": 4, **options})
    assert str(refused.value) == f"cost: {message}"


def test_kept_modes_go_by_their_names() -> None:
    by_name = ta.cost("truncated", (3, 4), dim=4, modes="h w", kept=[("h",), ("w",)])
    assert by_name.flops == ta.cost("truncated", (3, 4), dim=4, kept=[(0,), (1,)]).flops
