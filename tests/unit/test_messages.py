"""Every message of the core, whole: who speaks, the rule, the argument, the mode and both numbers.

Each case is also run under a guard that lets no operation touch a tensor of the grid before the error: what is
wrong is told before any work is done. Cases that read no values hold on the meta device too.
"""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tensorattn as ta
from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError, TensorAttentionError, WeightsError
from tensorattn.operators import OPERATORS
from tensorattn.testing.variants import variants

VARIANTS = variants()

LARGE = 100  # elements: every grid below has more, every weight vector fewer


class Guard(TorchDispatchMode):
    """Collect the operations that read or write a tensor of the grid; views do neither."""

    def __init__(self):
        super().__init__()
        self.work = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and any(
            isinstance(leaf, torch.Tensor) and leaf.numel() >= LARGE for leaf in tree_leaves((args, kwargs))
        ):
            self.work.append(str(func))
        return func(*args, **(kwargs or {}))


def refused(kind, message, function, *args, **kwargs):
    """Check that a call is refused with a whole message, before any work; arguments are made before the call."""
    with Guard() as guard, pytest.raises(kind) as error:
        function(*args, **kwargs)
    assert str(error.value) == message
    assert isinstance(error.value, TensorAttentionError)
    assert isinstance(error.value, ValueError)
    assert guard.work == []


@pytest.fixture(params=["cpu", "meta"])
def make(request):
    """Factory of tensors: on the meta device they have no values at all."""
    return lambda *shape, dtype=torch.float32: torch.empty(shape, device=request.param, dtype=dtype).fill_(1)


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


SIZE = (2, 3, 4, 5)  # batch, two modes, channels
READING = """
  modes    0 1
  query    (2, 3, 4, 5)   batch=(2,) positions=(3, 4) D=5
  key      (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5
  value    (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5"""

every_operator = pytest.mark.parametrize(
    "variant", VARIANTS[: len(OPERATORS)], ids=str
)  # options change no message here


def test_the_guard_sees_work():
    with Guard() as guard:
        ones(*SIZE).transpose(1, 2).add(1)
    assert guard.work == ["aten.add.Tensor"]
    with pytest.raises(AssertionError, match=r"aten\.sum"):
        refused(OptionError, no_operator("none"), lambda: (ones(*SIZE).sum(), ta.get_operator("none")))


def no_operator(name):
    return f"there is no operator {name!r}; the operators are: {', '.join(OPERATORS)}."


# Functions of query, key and value: the same rules for every operator.

SHAPES = {
    "key of too few dimensions": (
        [SIZE, (4, 5), SIZE],
        "key has 2 dimensions, but order 2 needs at least 3.",
        """
  modes    0 1
  query    (2, 3, 4, 5)
  key      (4, 5)
  value    (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5
  The layout is (*batch, n_1, ..., n_N, D).""",
    ),
    "value of too few dimensions": (
        [SIZE, SIZE, (4, 5)],
        "value has 2 dimensions, but order 2 needs at least 3.",
        """
  modes    0 1
  query    (2, 3, 4, 5)   batch=(2,) positions=(3, 4) D=5
  key      (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5
  value    (4, 5)
  The layout is (*batch, n_1, ..., n_N, D).""",
    ),
    "query of too few dimensions": (
        [(2,), (2, 7, 3, 4, 5), (2, 7, 3, 4, 5)],
        "query has 1 dimensions, but key has 2 batch dimensions, so query needs at least 3.",
        """
  modes    0 1
  query    (2,)
  key      (2, 7, 3, 4, 5)   batch=(2, 7) 0=3 1=4 D=5
  value    (2, 7, 3, 4, 5)   batch=(2, 7) 0=3 1=4 D=5""",
    ),
    "mode sizes": (
        [SIZE, SIZE, (2, 3, 6, 7)],
        "mode 1 has size 4 in key but 6 in value.",
        """
  modes    0 1
  query    (2, 3, 4, 5)   batch=(2,) positions=(3, 4) D=5
  key      (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5
  value    (2, 3, 6, 7)   batch=(2,) 0=3 1=6 D=7""",
    ),
    "batch of key and value": (
        [SIZE, SIZE, (1, 3, 4, 5)],
        "batch dimensions are (2,) in key but (1,) in value.",
        """
  modes    0 1
  query    (2, 3, 4, 5)   batch=(2,) positions=(3, 4) D=5
  key      (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5
  value    (1, 3, 4, 5)   batch=(1,) 0=3 1=4 D=5""",
    ),
    "batch of query and key": (
        [(7, 3, 4, 5), SIZE, SIZE],
        "batch dimensions are (7,) in query but (2,) in key.",
        """
  modes    0 1
  query    (7, 3, 4, 5)   batch=(7,) positions=(3, 4) D=5
  key      (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5
  value    (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5""",
    ),
    "head sizes": (
        [(2, 3, 4, 8), SIZE, SIZE],
        "head size is 8 in query but 5 in key.",
        """
  modes    0 1
  query    (2, 3, 4, 8)   batch=(2,) positions=(3, 4) D=8
  key      (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5
  value    (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5""",
    ),
    "empty mode": (
        [(2, 3, 0, 5), (2, 3, 0, 5), (2, 3, 0, 5)],
        "mode 1 has size 0 in key, but every mode needs at least 1 index.",
        """
  modes    0 1
  query    (2, 3, 0, 5)   batch=(2,) positions=(3, 0) D=5
  key      (2, 3, 0, 5)   batch=(2,) 0=3 1=0 D=5
  value    (2, 3, 0, 5)   batch=(2,) 0=3 1=0 D=5""",
    ),
}


@every_operator
@pytest.mark.parametrize("case", SHAPES)
def test_shapes_that_do_not_belong_together(variant, case, make):
    shapes, rule, reading = SHAPES[case]
    name = variant.operator.function.__name__
    refused(ShapeError, f"{name}: {rule}{reading}", variant.function, *(make(*s) for s in shapes), order=2)


@every_operator
@pytest.mark.parametrize(
    ("order", "rule"),
    [
        (0, "order must be at least 1, got 0."),
        (-2, "order must be at least 1, got -2."),
        ("3", "order must be an integer, got '3'."),
        (2.0, "order must be an integer, got 2.0."),
        (True, "order must be an integer, got True."),
        (None, "order must be an integer, got None."),
    ],
)
def test_an_order_that_is_none(variant, order, rule, make):
    x, name = make(*SIZE), variant.operator.function.__name__
    refused(OptionError, f"{name}: {rule}", variant.function, x, x, x, order=order)


@every_operator
def test_an_order_that_is_none_asked_for_its_log_sum_exp(variant, make):
    x, told = make(*SIZE), f"{variant.operator.function.__name__}: order must be an integer, got '3'."
    refused(OptionError, told, variant.function, x, x, x, order="3", return_lse=True)


@every_operator
@pytest.mark.parametrize(
    ("place", "dtype", "rule"),
    [
        (0, torch.int64, "query must be floating point, got torch.int64."),
        (1, torch.bool, "key must be floating point, got torch.bool."),
        (2, torch.complex64, "value must be floating point, got torch.complex64."),
        (1, torch.float64, "the type is torch.float32 in query but torch.float64 in key."),
        (2, torch.bfloat16, "the type is torch.float32 in query but torch.bfloat16 in value."),
    ],
)
def test_types(variant, place, dtype, rule, make):
    tensors = [make(*SIZE, dtype=dtype if k == place else torch.float32) for k in range(3)]
    name = variant.operator.function.__name__
    refused(DtypeError, f"{name}: {rule}{READING}", variant.function, *tensors, order=2)


@every_operator
def test_what_is_no_tensor(variant):
    x, name = ones(*SIZE), variant.operator.function.__name__
    reading = "\n".join(line for line in READING.split("\n") if "key" not in line)
    told = f"{name}: key must be a torch.Tensor, got list.{reading}"
    refused(DtypeError, told, variant.function, x, x.tolist(), x, order=2)


WEIGHTS = {
    "too few": ([None], "weights has 1 entries, but order 2 needs 2 vectors, one a mode."),
    "too many": ([None] * 3, "weights has 3 entries, but order 2 needs 2 vectors, one a mode."),
    "one tensor": (ones(2, 3), "weights has a single tensor, but order 2 needs 2 vectors, one a mode."),
    "no sequence": (5, "weights is 5, but order 2 needs 2 vectors, one a mode."),
    "a word": ("no", "weights is 'no', but order 2 needs 2 vectors, one a mode."),
    "words": ([["a", "b", "c"], None], "weights of mode 0 must be a tensor or numbers, got ['a', 'b', 'c']."),
    "complex": ([ones(3, dtype=torch.complex64), None], "weights of mode 0 must be real, got torch.complex64."),
    "too short": ([ones(2), None], "weights of mode 0 have length 2, but the mode has size 3."),
    "too long": ([None, ones(2, 6)], "weights of mode 1 have length 6, but the mode has size 4."),
    "a number": ([None, ones()], "weights of mode 1 have length no dimension, but the mode has size 4."),
    "batch": (
        [ones(7, 3), None],
        "weights of mode 0 have batch dimensions (7,), which do not broadcast to (2,).",
    ),
    "batch of too many dimensions": (
        [None, ones(1, 2, 4)],
        "weights of mode 1 have batch dimensions (1, 2), which do not broadcast to (2,).",
    ),
}
WHOLE = "mode 0 has size 2 in weights but 3 in {}."  # where one tensor over the grid has a meaning

VALUES = {
    "negative": ([None, torch.tensor([1, -2.5, 1, 1])], "weights of mode 1 must not be negative, got -2.5."),
    "all zero": ([torch.zeros(3), None], "weights of mode 0 are all zero, so no index takes part."),
    "all absent": ([torch.zeros(2, 3).bool(), None], "weights of mode 0 are all zero, so no index takes part."),
    "infinite": ([None, torch.tensor([1, 1, torch.inf, 1])], "weights of mode 1 must be finite, got 1 to inf."),
    "minus infinite": ([torch.tensor([1, -torch.inf, 1]), None], "weights of mode 0 must be finite, got -inf to 1."),
    "not a number": ([None, torch.tensor([1, 1, torch.nan, 1])], "weights of mode 1 must be finite, got nan to nan."),
}  # fmt: skip


@every_operator
@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit(variant, case, make):
    weights, rule = WEIGHTS[case]
    rule = WHOLE.format("key") if case == "one tensor" else rule
    x, name = make(*SIZE), variant.operator.function.__name__
    refused(WeightsError, f"{name}: {rule}{READING}", variant.function, x, x, x, order=2, weights=weights)


@every_operator
@pytest.mark.parametrize("case", VALUES)
def test_weights_that_are_none(variant, case):
    weights, rule = VALUES[case]
    x, name = ones(*SIZE), variant.operator.function.__name__
    refused(WeightsError, f"{name}: {rule}{READING}", variant.function, x, x, x, order=2, weights=weights)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.operator.query == "grid"], ids=str)
@pytest.mark.parametrize("positions", [(4, 3), (12,), (3, 5), ()], ids=str)
def test_queries_off_the_grid(variant, positions, make):
    key, name = make(*SIZE), variant.operator.function.__name__
    query = make(2, *positions, 5)
    width = max(len(str(tuple(query.shape))), len(str(SIZE)))
    reading = READING.split("\n")
    reading[2] = f"  query    {tuple(query.shape)!s:<{width}}   batch=(2,) positions={positions} D=5"
    told = f"{name}: query must be on the grid of key, but has positions {positions} where key has (3, 4)."
    aligned = [
        line.replace(str(SIZE), f"{SIZE!s:<{width}}") if "ue " in line or "key" in line else line for line in reading
    ]
    refused(ShapeError, told + "\n".join(aligned), variant.function, query, key, key, order=2)


@every_operator
@pytest.mark.parametrize("dropout_p", [-0.1, 1.5, float("nan")])
def test_a_dropout_that_is_no_probability(variant, dropout_p, make):
    x, name = make(*SIZE), variant.operator.function.__name__
    told = f"{name}: dropout_p must be between 0 and 1, got {dropout_p}.{READING}"
    refused(OptionError, told, variant.function, x, x, x, order=2, dropout_p=dropout_p)


@every_operator
@pytest.mark.parametrize("dropout_p", ["a", None, True, [0.5]])
def test_a_dropout_that_is_no_number(variant, dropout_p, make):
    x, name = make(*SIZE), variant.operator.function.__name__
    told = f"{name}: dropout_p must be between 0 and 1, got {dropout_p!r}.{READING}"
    refused(OptionError, told, variant.function, x, x, x, order=2, dropout_p=dropout_p)


@every_operator
def test_a_scale_that_is_no_number(variant, make):
    x, name = make(*SIZE), variant.operator.function.__name__
    hint = "\n  For a learned scale multiply the query by it, with scale=1.0."
    cases = [
        ("a", "scale must be a number or None, got 'a'.", ""),
        (True, "scale must be a number or None, got True.", ""),
        (1j, "scale must be a number or None, got 1j.", ""),
        ([0.5], "scale must be a number or None, got [0.5].", ""),
        (make(), "scale must be a number or None, got a tensor of shape ().", hint),
        (make(2, 1), "scale must be a number or None, got a tensor of shape (2, 1).", hint),
        (float("nan"), "scale must be finite, got nan.", ""),
        (float("inf"), "scale must be finite, got inf.", ""),
    ]
    for scale, rule, more in cases:
        refused(OptionError, f"{name}: {rule}{READING}{more}", variant.function, x, x, x, order=2, scale=scale)


class _BySize(torch.nn.Module):
    """Attention whose scale is a symbol where sizes are."""

    def forward(self, x):
        return ta.additive_attention(x, x, x, order=2, scale=1 / x.shape[-2], return_lse=True).output


@pytest.mark.parametrize("strict", [False, True])
def test_a_scale_may_be_a_symbol_while_a_graph_is_recorded(strict):
    sizes = ({2: torch.export.Dim("w", min=3, max=100)},)
    program = torch.export.export(_BySize(), (ones(2, 3, 4, 8),), dynamic_shapes=sizes, strict=strict)
    x = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(program.module()(x), _BySize()(x))


@every_operator
def test_switches_that_are_words(variant, make):
    x, name = make(*SIZE), variant.operator.function.__name__
    switches = [option for option, value in variant.operator.options.items() if isinstance(value, bool)]
    for switch in ("return_lse", "return_attention", *switches):
        for value in ("no", 1, None):
            if switch == "return_lse" and value != "no":
                continue
            told = f"{name}: {switch} must be True or False, got {value!r}.{READING}"
            if name == "kao_qkv" and switch == "return_lse":
                continue  # it needs centered=True first
            refused(OptionError, told, variant.operator.function, x, x, x, order=2, **{switch: value})
            if switch in switches:
                told = f"TensorAttention: {switch} must be True or False, got {value!r}."
                options = {"modes": 2, "operator": variant.name, switch: value}
                refused(OptionError, told, ta.TensorAttention, 8, 2, **options)


@every_operator
def test_tensors_on_different_devices(variant):
    near, far, name = ones(*SIZE), torch.empty(SIZE, device="meta"), variant.operator.function.__name__
    told = f"{name}: the device is cpu in query but meta in key.{READING}"
    refused(DtypeError, told, variant.function, near, far, far, order=2)
    told = f"{name}: the device is cpu in query but meta in value.{READING}"
    refused(DtypeError, told, variant.function, near, near, far, order=2)


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if "include_self" in operator.options])
@pytest.mark.parametrize("positions", [(4, 3), (7,), (3, 5), ()], ids=str)
def test_an_own_token_off_the_grid(name, positions, make):
    key, function = make(*SIZE), OPERATORS[name].function
    query = make(2, *positions, 5)
    width = max(len(str(tuple(query.shape))), len(str(SIZE)))
    rule = f"include_self needs the query on the grid of key, but query has positions {positions} where key has (3, 4)."
    told = [f"{function.__name__}: {rule}", "  modes    0 1"]
    told.append(f"  query    {tuple(query.shape)!s:<{width}}   batch=(2,) positions={positions} D=5")
    told += [f"  {each:<8} {SIZE!s:<{width}}   batch=(2,) 0=3 1=4 D=5" for each in ("key", "value")]
    refused(ShapeError, "\n".join(told), function, query, key, key, order=2, include_self=True)


@every_operator
def test_integers_of_numpy(variant):
    x = ones(*SIZE)
    expected = variant.function(x, x, x, order=2)
    torch.testing.assert_close(variant.function(x, x, x, order=np.int64(2)), expected, rtol=0, atol=0)
    layer = ta.TensorAttention(np.int64(8), np.int32(2), modes=np.int16(2), operator=variant.name)
    assert (type(layer.embed_dim), type(layer.num_heads), layer.modes.order) == (int, int, 2)
    assert layer(ones(2, 3, 4, 8)).shape == (2, 3, 4, 8)


LACKS = [(name, argument) for name, operator in OPERATORS.items() for argument in operator.lacks]


@pytest.mark.parametrize(("name", "argument"), LACKS)
def test_arguments_without_a_meaning(name, argument, make):
    x, operator = make(*SIZE), OPERATORS[name]
    given = {"bias": [None, make(4, 4)], "causal": 1, "return_lse": True}[argument]
    rule = f"{argument} has no meaning for this operator: {operator.lacks[argument]}."
    told = f"{operator.function.__name__}: {rule}{READING}"
    refused(OptionError, told, operator.function, x, x, x, order=2, **{argument: given})


def test_some_argument_lacks_a_meaning_somewhere():
    assert {("axial", "return_lse"), ("kao_qkv", "bias"), ("kao_qkv", "causal")} <= set(LACKS)


@pytest.mark.parametrize("options", [{}, {"centered": True, "interaction": "linear"}], ids=str)
def test_a_log_sum_exp_that_is_none(options, make):
    x = make(*SIZE)
    rule = "return_lse needs centered=True without interaction: otherwise the output is not that of one softmax."
    told = f"kao_qkv: {rule}{READING}\n  Use additive_attention."
    refused(OptionError, told, ta.kao_qkv, x, x, x, order=2, return_lse=True, **options)


OPTION_VALUES = [
    ("interaction", "cubic", "interaction must be None or 'linear', got 'cubic'."),
    ("saturation", 0, "saturation must be positive or None, got 0."),
    ("saturation", -1.5, "saturation must be positive or None, got -1.5."),
    ("saturation", float("nan"), "saturation must be positive or None, got nan."),
    ("saturation", "x", "saturation must be positive or None, got 'x'."),
    ("saturation", True, "saturation must be positive or None, got True."),
    ("pool", "max", "pool must be 'mean' or 'sum', got 'max'."),
    ("interaction_order", 0, "interaction_order must be an integer between 1 and order 2, got 0."),
    ("interaction_order", 3, "interaction_order must be an integer between 1 and order 2, got 3."),
    ("interaction_order", 1.0, "interaction_order must be an integer between 1 and order 2, got 1.0."),
]
BAD_OPTIONS = [
    pytest.param(name, {option: value}, rule, id=f"{name}-{option}={value}")
    for name, operator in OPERATORS.items()
    for option, value, rule in OPTION_VALUES
    if option in operator.options and (name, option) != ("kao_qkv", "saturation")  # it needs an interaction first
]


@pytest.mark.parametrize(("name", "options", "rule"), BAD_OPTIONS)
def test_values_of_options(name, options, rule, make):
    x, function = make(*SIZE), OPERATORS[name].function
    if name == "kao_qkv":
        options = {"centered": True, **options}
    refused(OptionError, f"{function.__name__}: {rule}{READING}", function, x, x, x, order=2, **options)


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if operator.options])
def test_values_of_options_of_the_module(name):
    """What is wrong with a layer is told where it is made, not in its first step."""
    for option, value, rule in OPTION_VALUES:
        if option in OPERATORS[name].options and (name, option) != ("kao_qkv", "saturation"):
            options = {option: value, **({"centered": True} if name == "kao_qkv" else {})}
            told = f"TensorAttention: {rule}"
            refused(OptionError, told, ta.TensorAttention, 8, 2, modes=2, operator=name, **options)


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if "saturation" in operator.options])
@pytest.mark.parametrize("saturation", [0.5, None])
def test_a_saturation_without_an_interaction(name, saturation, make):
    x, function = make(*SIZE), OPERATORS[name].function
    rule = f"saturation has no effect without interaction, got {saturation}."
    hint = "\n  Give interaction='linear' too, or leave saturation out."
    told = f"{function.__name__}: {rule}{READING}{hint}"
    refused(OptionError, told, function, x, x, x, order=2, saturation=saturation)
    told = f"TensorAttention: {rule}{hint}"
    refused(OptionError, told, ta.TensorAttention, 8, 2, modes=2, operator=name, saturation=saturation)
    function(x, x, x, order=2, saturation=1.0)  # the default may be said


def test_an_interaction_of_the_published_form(make):
    x = make(*SIZE)
    rule = "interaction needs centered=True: the published form has no first order to correct."
    refused(OptionError, f"kao_qkv: {rule}{READING}", ta.kao_qkv, x, x, x, order=2, interaction="linear")


def test_subsets_that_are_kept(make):
    x, both = make(*SIZE), "kept and interaction_order exclude each other, but both are given."
    cases = [
        (OptionError, {"kept": [(0,)], "interaction_order": 1}, both),
        (ModesError, {"kept": []}, "kept is empty, but at least one subset of modes must be kept."),
        (ModesError, {"kept": [(0,), ()]}, "each subset in kept must name modes, none of them twice, got ()."),
        (ModesError, {"kept": [(1, -1)]}, "each subset in kept must name modes, none of them twice, got (1, 1)."),
        (ModesError, {"kept": [(0, 2)]}, "there is no mode 2 among '0 1' (order 2)."),
    ]
    for kind, options, rule in cases:
        told = f"truncated_attention: {rule}{READING}"
        refused(kind, told, ta.truncated_attention, x, x, x, order=2, **options)
    for kept, rule in NO_SUBSETS:
        told = f"truncated_attention: {rule}{READING}{SUBSETS}"
        refused(ModesError, told, ta.truncated_attention, x, x, x, order=2, kept=kept)
        told = f"TensorAttention: {rule}{SUBSETS}"
        refused(ModesError, told, ta.TensorAttention, 8, 2, modes="t h", operator="truncated", kept=kept)


SUBSETS = "\n  Write [(0,), (1, 2)] for the modes 0, 1 and 2, the last two together."
NO_SUBSETS = [
    ([1], "each subset in kept must be a sequence of modes, got 1."),
    ([(0,), "t"], "each subset in kept must be a sequence of modes, got 't'."),
    (1, "kept must hold subsets of modes, got 1."),
    ("t", "kept must hold subsets of modes, got 't'."),
]


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if "bias" not in operator.lacks])
def test_biases_that_do_not_fit(name, make):
    x, function = make(*SIZE), OPERATORS[name].function
    shape = "bias of mode {} has shape {}, but query has {} positions and key {} along the mode."
    batch = "bias of mode 0 has batch dimensions {}, which do not broadcast to (2,)."
    cases = [
        ([None], ShapeError, "bias has 1 entries, but order 2 needs 2 tensors, one a mode."),
        (make(2, 4), ShapeError, "bias has a single tensor, but order 2 needs 2 tensors, one a mode."),
        ([None, make(3, 3)], ShapeError, shape.format(1, (3, 3), 4, 4)),
        ([make(3), None], ShapeError, shape.format(0, (3,), 3, 3)),
        ([make(7, 3, 3), None], ShapeError, batch.format((7,))),
        ([make(1, 2, 3, 3), None], ShapeError, batch.format((1, 2))),
        ([make(3, 3, dtype=torch.int64), None], DtypeError, "bias of mode 0 must be floating point, got torch.int64."),
        ([make(3, 3, dtype=torch.complex64), None], DtypeError, "bias of mode 0 must be real, got torch.complex64."),
        (5, ShapeError, "bias is 5, but order 2 needs 2 tensors, one a mode."),
        ("no", ShapeError, "bias is 'no', but order 2 needs 2 tensors, one a mode."),
        ([[["a"]], None], DtypeError, "bias of mode 0 must be a tensor or numbers, got [['a']]."),
        ([[[1.0], [1, 2]], None], DtypeError, "bias of mode 0 must be a tensor or numbers, got [[1.0], [1, 2]]."),
        ([[[1.0, 2.0]], None], ShapeError, shape.format(0, (1, 2), 3, 3)),
        ([5, None], ShapeError, shape.format(0, (), 3, 3)),
    ]
    for bias, kind, rule in cases:
        refused(kind, f"{function.__name__}: {rule}{READING}", function, x, x, x, order=2, bias=bias)


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if "bias" not in operator.lacks])
def test_biases_of_other_types_are_brought_to_that_of_the_averages(name):
    function, draw = OPERATORS[name].function, torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=draw)
    bias = [torch.randn(3, 3, generator=draw, dtype=torch.float64), torch.randn(2, 4, 4, generator=draw)]
    expected = function(x, x, x, order=2, bias=[bias[0].float(), bias[1]])
    for given in (bias, [bias[0].tolist(), bias[1].numpy()], (bias[0].float(), bias[1].double())):
        output = function(x, x, x, order=2, bias=given)
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, expected)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        output = function(half, half, half, order=2, bias=bias)
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if "causal" not in operator.lacks])
def test_modes_that_cannot_be_causal(name, make):
    x, function = make(*SIZE), OPERATORS[name].function
    cases = [
        (2, ModesError, "there is no mode 2 among '0 1' (order 2)."),
        (-3, ModesError, "there is no mode -3 among '0 1' (order 2)."),
        ("t", OptionError, "causal must be the index of a mode, got 't'."),
        (True, OptionError, "causal must be the index of a mode, got True."),
    ]
    for causal, kind, rule in cases:
        refused(kind, f"{function.__name__}: {rule}{READING}", function, x, x, x, order=2, causal=causal)


def test_queries_that_have_no_place_in_time(make):
    key, frames = make(*SIZE), "causal needs the same frames in query and key"
    keys = READING.split("\n")[3:]
    cases = [
        ((2, 12, 5), "(12,)", "causal needs a query over 2 modes, but query has 1 position dimensions."),
        ((2, 3, 7, 5), "(3, 7)", f"{frames}, but mode 1 has size 7 in query and 4 in key."),
    ]
    for shape, positions, rule in cases:
        line = f"  query    {shape!s:<12}   batch=(2,) positions={positions} D=5"
        told = "\n".join([f"flattened_attention: {rule}", "  modes    0 1", line, *keys])
        refused(ShapeError, told, ta.flattened_attention, make(*shape), key, key, order=2, causal=1)
    line = "  query    (2, 12, 5)     batch=(2,) positions=(12,) D=5"
    rule = "bias needs a query over 2 modes, but query has 1 position dimensions."
    told = "\n".join([f"flattened_attention: {rule}", "  modes    0 1", line, *keys])
    bias = [None, make(4, 4)]
    refused(ShapeError, told, ta.flattened_attention, make(2, 12, 5), key, key, order=2, bias=bias)


def test_attention_that_does_not_merge(make):
    output, lse = make(2, 30, 5), make(2, 30)
    cases = [
        ([], "parts is empty, but at least one output with its log-sum-exp is needed."),
        (
            [(output, lse), (make(2, 31, 5), make(2, 31))],
            "outputs have shape (2, 30, 5) in parts[0] but (2, 31, 5) in parts[1].",
        ),
        ([(output, make(2, 1))], "parts[0] has output (2, 30, 5) but log-sum-exp (2, 1)."),
    ]
    for parts, rule in cases:
        refused(ShapeError, f"merge_attention: {rule}", ta.merge_attention, parts)


# Functions of one tensor.

TENSOR = """
  modes    0 1
  tensor   (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5"""


@pytest.mark.parametrize("function", [ta.mode_averages, ta.additive_part, ta.interaction_residual])
class TestAverages:
    def test_shapes(self, function, make):
        name = function.__name__
        rule = "tensor has 2 dimensions, but order 2 needs at least 3."
        reading = "  modes    0 1\n  tensor   (25, 5)\n  The layout is (*batch, n_1, ..., n_N, D)."
        refused(ShapeError, f"{name}: {rule}\n{reading}", function, make(25, 5), order=2)
        rule = "mode 0 has size 0 in tensor, but every mode needs at least 1 index."
        reading = "  modes    0 1\n  tensor   (2, 0, 4, 5)   batch=(2,) 0=0 1=4 D=5"
        refused(ShapeError, f"{name}: {rule}\n{reading}", function, make(2, 0, 4, 5), order=2)

    def test_order(self, function, make):
        name, x = function.__name__, make(*SIZE)
        refused(OptionError, f"{name}: order must be at least 1, got 0.", function, x, order=0)
        refused(OptionError, f"{name}: order must be an integer, got '3'.", function, x, order="3")

    def test_types(self, function, make):
        name, integers = function.__name__, make(*SIZE, dtype=torch.int32)
        rule = "tensor must be floating point, got torch.int32."
        refused(DtypeError, f"{name}: {rule}{TENSOR}", function, integers, order=2)
        if function is ta.mode_averages:
            for dtype, rule in (
                ("float32", "dtype must be a torch.dtype such as torch.float32, got 'float32'."),
                (np.float32, "dtype must be a torch.dtype such as torch.float32, got <class 'numpy.float32'>."),
                (torch.int32, "dtype must be floating point, got torch.int32."),
            ):
                refused(DtypeError, f"{name}: {rule}{TENSOR}", function, make(*SIZE), order=2, dtype=dtype)
        rule = "tensor must be a torch.Tensor, got list."
        refused(DtypeError, f"{name}: {rule}", function, [[1.0]], order=1)

    @pytest.mark.parametrize("case", WEIGHTS)
    def test_weights_that_do_not_fit(self, function, case, make):
        weights, rule = WEIGHTS[case]
        if case == "one tensor" and function is ta.mode_averages:
            rule = WHOLE.format("tensor")
        told = f"{function.__name__}: {rule}{TENSOR}"
        refused(WeightsError, told, function, make(*SIZE), order=2, weights=weights)

    @pytest.mark.parametrize("case", VALUES)
    def test_weights_that_are_none(self, function, case):
        weights, rule = VALUES[case]
        told = f"{function.__name__}: {rule}{TENSOR}"
        refused(WeightsError, told, function, ones(*SIZE), order=2, weights=weights)


def test_outer_sum(make):
    rows, columns = make(2, 30, 5), make(2, 40, 5)
    cases = [
        ([], ShapeError, "vectors is empty, but every mode needs one."),
        ([rows, make(3, 40, 5)], ShapeError, "batch dimensions are (2,) in vectors[0] but (3,) in vectors[1]."),
        ([rows, make(40, 5)], ShapeError, "batch dimensions are (2,) in vectors[0] but () in vectors[1]."),
        ([rows, columns, make(2, 4, 6)], ShapeError, "channels are 5 in vectors[0] but 6 in vectors[2]."),
        ([rows, make(2, 0, 5)], ShapeError, "mode 0 has size 0 in vectors[1], but every mode needs at least 1 index."),
        ([rows, rows.double()], DtypeError, "the type is torch.float32 in vectors[0] but torch.float64 in vectors[1]."),
        ([rows, rows.long()], DtypeError, "vectors[1] must be floating point, got torch.int64."),
        ([None, rows], DtypeError, "vectors[0] must be a torch.Tensor, got NoneType."),
    ]
    for vectors, kind, rule in cases:
        refused(kind, f"outer_sum: {rule}", ta.outer_sum, vectors)
    whole = [
        ({"skip": make(2, 30, 41, 5)}, ShapeError, "skip has shape (2, 30, 41, 5), but the result has (2, 30, 40, 5)."),
        ({"out": make(2, 30, 5)}, ShapeError, "out has shape (2, 30, 5), but the result has (2, 30, 40, 5)."),
        (
            {"out": make(2, 30, 40, 5, dtype=torch.float64)},
            DtypeError,
            "the type is torch.float32 in the result but torch.float64 in out.",
        ),
    ]
    for arguments, kind, rule in whole:
        refused(kind, f"outer_sum: {rule}", ta.outer_sum, [rows, columns], **arguments)
    rule = "out is given where derivatives are asked for, but none goes through it."
    hint = "\n  Use torch.no_grad(), or leave out."
    learned, out = [rows.clone().requires_grad_(), columns], make(2, 30, 40, 5)
    refused(OptionError, f"outer_sum: {rule}{hint}", ta.outer_sum, learned, out=out)
    rule = "vectors[0] has 1 dimensions, but order 1 needs at least 2."
    hint = "\n  The layout is (*batch, n_1, ..., n_N, D)."
    refused(ShapeError, f"outer_sum: {rule}{hint}", ta.outer_sum, [make(100)])


# Summaries.

PAIR = "\n".join(line for line in READING.split("\n") if "query" not in line)


def test_summarize(make):
    x = make(*SIZE)
    cases = [
        (x, make(2, 3, 6, 5), {}, ShapeError, "mode 1 has size 4 in key but 6 in value."),
        (x, make(1, 3, 4, 5), {}, ShapeError, "batch dimensions are (2,) in key but (1,) in value."),
        (x, x.long(), {}, DtypeError, "value must be floating point, got torch.int64."),
        (x, x, {"kept": [(0,), (2,)]}, ModesError, "there is no mode 2 among '0 1' (order 2)."),
        (x, x, {"kept": []}, ModesError, "kept is empty, but a summary needs at least one subset of modes."),
        (x, x, {"second_moment": "no"}, OptionError, "second_moment must be True or False, got 'no'."),
        (x, x, {"weights": [None]}, WeightsError, WEIGHTS["too few"][1]),
    ]
    for key, value, options, kind, rule in cases:
        other = PAIR.split("\n")
        other[-1] = other[-1].replace(str(SIZE), str(tuple(value.shape)))
        other[-1] = other[-1].replace("1=4", f"1={value.shape[2]}").replace("batch=(2,)", f"batch=({value.shape[0]},)")
        told = f"summarize: {rule}" + "\n".join(other)
        refused(kind, told, ta.summarize, key, value, order=2, **options)
    refused(OptionError, "summarize: order must be at least 1, got 0.", ta.summarize, x, x, order=0)
    for kept, rule in NO_SUBSETS:
        refused(ModesError, f"summarize: {rule}{PAIR}{SUBSETS}", ta.summarize, x, x, order=2, kept=kept)


def test_means_that_a_summary_does_not_hold(make):
    x = make(*SIZE)
    summary = ta.summarize(x, x, order=2, kept=[(0,), ()])
    rule = "the summary holds the kept modes ((0,), ()), but not (1,)."
    refused(OptionError, rule, summary.tokens, (1,))
    refused(OptionError, rule, summary.place, (1,))


def test_summaries_that_do_not_merge(make):
    def summary(*shape, **options):
        x = make(*shape)
        return ta.summarize(x, x, order=2, **options)

    whole = summary(2, 30, 40, 5)
    moments = summary(2, 30, 40, 5, second_moment=True)
    without_mean = summary(2, 30, 40, 5, kept=[(0,)])
    cases = [
        (whole, without_mean, "the summaries hold different kept modes: ((0,), (1,), ()) and ((0,),)."),
        (whole, summary(3, 30, 40, 5), "the summaries have different batch dimensions: (2,) and (3,)."),
        (whole, summary(2, 30, 41, 5), "mode 1 has size 40 in one summary but 41 in the other."),
        (whole, moments, "second moments merge only if both summaries hold them, and their grand means."),
    ]
    for first, second, rule in cases:
        refused(ShapeError, f"Summary.merge: {rule}", first.merge, second, mode=0)
    told = "Summary.merge: there is no mode {} among '0 1' (order 2)."
    refused(ModesError, told.format(2), whole.merge, whole, mode=2)
    refused(ModesError, told.format("'t'"), whole.merge, whole, mode="t")


def test_summaries_of_different_tensors_do_not_merge(make):
    x = make(2, 30, 40, 5)
    whole = ta.summarize(x, x, order=2)
    longer, double = make(2, 30, 40, 6), make(2, 30, 40, 5, dtype=torch.float64)
    keys = dataclasses.replace(whole, values=(None,) * 3)
    cases = [
        (ta.summarize(x, x, order=3), ShapeError, "the summaries have different orders: 2 and 3."),
        (
            ta.summarize(longer, x, order=2),
            ShapeError,
            "the keys have head size 5 in one summary but 6 in the other.",
        ),
        (
            ta.summarize(x, longer, order=2),
            ShapeError,
            "the values have head size 5 in one summary but 6 in the other.",
        ),
        (
            ta.summarize(double, double, order=2),
            DtypeError,
            "the type of the keys is torch.float32 in one summary but torch.float64 in the other.",
        ),
        (keys, ShapeError, "only one of the summaries holds the mean values of the kept modes (0,)."),
        (x.shape, OptionError, "other must be a Summary, got Size."),
    ]
    for other, kind, rule in cases:
        refused(kind, f"Summary.merge: {rule}", whole.merge, other, mode=0)
    other = ta.summarize(torch.ones(2, 30, 40, 5), torch.ones(2, 30, 40, 5), order=2)
    if x.is_meta:
        rule = "the device of the keys is meta in one summary but cpu in the other."
        refused(DtypeError, f"Summary.merge: {rule}", whole.merge, other, mode=0)


def test_linear_maps_that_do_not_fit_a_summary(make):
    summary = ta.summarize(make(2, 30, 40, 5), make(2, 30, 40, 7), order=2)
    good = (make(6, 5), make(4, 7))
    cases = [
        ((make(6, 4), good[1]), {}, ShapeError, "key_weight has 4 columns, but the keys have head size 5."),
        ((good[0], make(4, 5)), {}, ShapeError, "value_weight has 5 columns, but the values have head size 7."),
        ((make(5), good[1]), {}, ShapeError, "key_weight has 1 dimensions, but needs 2."),
        ((make(6, 5, dtype=torch.int64), good[1]), {}, DtypeError, floating("key_weight", "torch.int64")),
        ((good[0], [[1.0]]), {}, DtypeError, floating("value_weight", "list")),
        (good, {"key_bias": make(4)}, ShapeError, "key_bias has 4 entries, but key_weight has 6 rows."),
        (good, {"value_bias": make(6)}, ShapeError, "value_bias has 6 entries, but value_weight has 4 rows."),
        (good, {"value_bias": make(1, 4)}, ShapeError, "value_bias has 2 dimensions, but needs 1."),
        (good, {"num_heads": 3}, ShapeError, "value_weight has 4 rows, which num_heads=3 does not divide."),
        (good, {"num_heads": 4}, ShapeError, "key_weight has 6 rows, which num_heads=4 does not divide."),
        (good, {"num_heads": 0}, OptionError, "num_heads must be at least 1, got 0."),
        (good, {"num_heads": 2.0}, OptionError, "num_heads must be an integer, got 2.0."),
    ]
    for weights, options, kind, rule in cases:
        refused(kind, f"Summary.project: {rule}", summary.project, *weights, **options)


def floating(argument, got):
    return f"{argument} must be a floating-point tensor, got {got}."


# Plans.

PLANS = {
    "dtype": ({"dtype": "int8"}, OptionError, "dtype must be one of float64, float32, bfloat16, float16, got 'int8'."),
    "torch dtype": (
        {"dtype": torch.float32},
        OptionError,
        "dtype must be one of float64, float32, bfloat16, float16, got torch.float32.\n"
        "  Write the name of the type, such as 'float32'.",
    ),
    "layout": (
        {"layout": "NHWC"},
        OptionError,
        "layout must be 'channels_last', 'channels_first' or strides, got 'NHWC'.",
    ),
    "no layout": (
        {"layout": None},
        OptionError,
        "layout must be 'channels_last', 'channels_first' or strides, got None.",
    ),
    "too few strides": ({"layout": (4, 1)}, OptionError, "layout has 2 strides, but the tensor has 3 dimensions."),
    "strides of the batch": (
        {"layout": (4, 1, 1), "batch": (2,)},
        OptionError,
        "layout has 3 strides, but the tensor has 4 dimensions.",
    ),
    "strides of no integers": (
        {"layout": (4.0, 1, 1)},
        OptionError,
        "the strides in layout must be integers, got (4.0, 1, 1).",
    ),
    "negative strides": (
        {"layout": (4, -1, 1)},
        OptionError,
        "the strides in layout must not be negative, got (4, -1, 1).",
    ),
    "sizes of no integers": ({"sizes": (3, 4.0)}, OptionError, "sizes must be integers, got (3, 4.0)."),
    "a truth value of sizes": ({"sizes": (3, True)}, OptionError, "sizes must be integers, got (3, True)."),
    "one size": ({"sizes": 3}, OptionError, "sizes must be integers, got 3."),
    "no subsets": ({"kept": 1}, ModesError, f"kept must hold subsets of modes, got 1.{SUBSETS}"),
    "empty mode": (
        {"sizes": (3, 0)},
        OptionError,
        "mode 1 has size 0 in sizes, but every mode needs at least 1 index.",
    ),
    "negative size": (
        {"sizes": (-3, 2), "modes": "h w"},
        OptionError,
        "mode 'h' has size -3 in sizes, but every mode needs at least 1 index.",
    ),
    "names": ({"modes": "t h w"}, OptionError, "modes names 3 modes, but sizes has 2."),
    "number of modes": ({"modes": 3}, OptionError, "modes names 3 modes, but sizes has 2."),
    "repeated name": ({"modes": "h h"}, ModesError, "mode names must differ, but 'h' appears 2 times in 'h h'."),
    "kept": ({"kept": [(0,), (2,)]}, ModesError, "there is no mode 2 among '0 1' (order 2)."),
    "kept name": ({"kept": [("c",)], "modes": "h w"}, ModesError, "there is no mode 'c' among 'h w' (order 2)."),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANS)
def test_plan(case):
    options, kind, rule = PLANS[case]
    refused(kind, f"plan: {rule}", ta.plan, **{"sizes": (3, 4), **options})


def test_a_plan_for_another_array(make):
    plan = ta.plan((3, 4), dim=5, batch=(2,))
    rule = "the array has shape (2, 4, 3, 5), but the plan is for (2, 3, 4, 5)."
    refused(ShapeError, f"Plan.execute: {rule}", plan.execute, make(2, 4, 3, 5))


PLANNED = ta.plan((3, 4), dim=5, batch=(2,), modes="h w")


def test_what_a_plan_cannot_execute(make):
    cases = [
        ([1.0], DtypeError, "array must be an array of NumPy, JAX or PyTorch, got list."),
        (make(*SIZE, dtype=torch.int64), DtypeError, "array must be floating point, got int64."),
        (np.ones(SIZE, dtype=bool), DtypeError, "array must be floating point, got bool."),
        (np.ones(SIZE, dtype=complex), DtypeError, "array must be floating point, got complex128."),
    ]
    for array, kind, rule in cases:
        refused(kind, f"Plan.execute: {rule}", PLANNED.execute, array)


@pytest.mark.parametrize("case", {**WEIGHTS, **VALUES})
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_weights_of_a_plan(case, library):
    weights, rule = {**WEIGHTS, **VALUES}[case]
    array = ones(*SIZE) if library == "torch" else np.ones(SIZE, dtype=np.float32)
    if library == "numpy" and not isinstance(weights, torch.Tensor | int | str):
        weights = [vector.numpy() if isinstance(vector, torch.Tensor) else vector for vector in weights]
    named = rule.replace("mode 0", "mode 'h'").replace("mode 1", "mode 'w'").replace("a tensor or", "an array or")
    if library == "numpy":
        named = named.replace("torch.", "")
    refused(WeightsError, f"Plan.execute: {named}", PLANNED.execute, array, weights)


# Modes and the registry.

MODES = {
    "repeated": ("h w h", "mode names must differ, but 'h' appears 2 times in 'h w h'."),
    "no word": ("t 2h w", "mode names must be words of letters, digits and underscores, got '2h'."),
    "not a name": (("t", 2), "mode names must be words of letters, digits and underscores, got 2."),
    "none": ("", "modes must name at least one mode, got ''."),
    "no names": ((), "modes must name at least one mode, got ()."),
    "neither": (2.5, "modes must be a number or names, got 2.5."),
    "a truth value": (True, "modes must be a number or names, got True."),
}


@pytest.mark.parametrize("case", MODES)
def test_modes(case):
    modes, rule = MODES[case]
    refused(ModesError, rule, ta.ModeSpec.parse, modes)
    refused(ModesError, f"TensorAttention: {rule}", ta.TensorAttention, 8, 2, modes=modes)


def test_a_mode_that_does_not_exist():
    modes = ta.ModeSpec.parse("t h w")
    for mode in ("c", 3, -4, True, 1.0, None):
        rule = f"there is no mode {mode!r} among 't h w' (order 3)."
        refused(ModesError, rule, modes.index, mode)
    refused(OptionError, "modes must be at least 1, got 0.", ta.ModeSpec.parse, 0)


def test_the_registry():
    refused(OptionError, no_operator("nope"), ta.get_operator, "nope")
    twin = ta.Operator("additive", ta.kao_kv, None, None, None)
    before = dict(OPERATORS)
    refused(OptionError, "there is already an operator 'additive'.", ta.register_operator, twin)
    assert before == OPERATORS
    assert ta.register_operator(OPERATORS["additive"]) is OPERATORS["additive"]  # the same one again changes nothing


# The module.

CONSTRUCTION = {
    "operator": ({"operator": "nope"}, no_operator("nope")),
    "heads": ({"num_heads": 5}, "embed_dim must be divisible by num_heads, got 96 and 5."),
    "no heads": ({"num_heads": 0}, "embed_dim and num_heads must be at least 1, got 96 and 0."),
    "no channels": ({"embed_dim": 0}, "embed_dim and num_heads must be at least 1, got 0 and 4."),
    "dropout": ({"dropout": 1.5}, "dropout must be between 0 and 1, got 1.5."),
    "negative dropout": ({"dropout": -0.5}, "dropout must be between 0 and 1, got -0.5."),
    "no order": ({"modes": 0}, "modes must be at least 1, got 0."),
    "heads of no integer": ({"num_heads": 4.0}, "num_heads must be an integer, got 4.0."),
    "a truth value of heads": ({"num_heads": True}, "num_heads must be an integer, got True."),
    "channels of no integer": ({"embed_dim": "96"}, "embed_dim must be an integer, got '96'."),
    "dropout of no number": ({"dropout": "a"}, "dropout must be between 0 and 1, got 'a'."),
    "channels first": ({"channels_first": "no"}, "channels_first must be True or False, got 'no'."),
    "bias": ({"bias": 0}, "bias must be True or False, got 0."),
    "mode projections": ({"mode_projections": "no"}, "mode_projections must be True or False, got 'no'."),
    "norm": ({"qk_norm": "no"}, "qk_norm must be True or False, got 'no'."),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(case):
    arguments, rule = CONSTRUCTION[case]
    arguments = {"embed_dim": 96, "num_heads": 4, "modes": 3, **arguments}
    refused(OptionError, f"TensorAttention: {rule}", ta.TensorAttention, **arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_settings_without_a_meaning_for_the_operator(name):
    for setting in ("mode_projections", "qk_norm"):
        if not OPERATORS[name].pools:
            rule = f"{setting} has no meaning for operator {name!r}: it does not pool its queries."
            arguments = {"modes": 3, "operator": name, setting: True}
            refused(OptionError, f"TensorAttention: {rule}", ta.TensorAttention, 96, 4, **arguments)
    if "causal" in OPERATORS[name].lacks:
        rule = f"causal has no meaning for operator {name!r}: {OPERATORS[name].lacks['causal']}."
        refused(OptionError, f"TensorAttention: {rule}", ta.TensorAttention, 96, 4, modes=3, operator=name, causal=0)


def test_options_that_name_modes():
    told = "TensorAttention: there is no mode {} among 't h w' (order 3)."
    for causal in ("c", 3, True):
        refused(ModesError, told.format(repr(causal)), ta.TensorAttention, 96, 4, modes="t h w", causal=causal)
    kept = {"operator": "truncated", "kept": [("t", "h"), ("c",)]}
    refused(ModesError, told.format("'c'"), ta.TensorAttention, 96, 4, modes="t h w", **kept)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_unknown_option(name):
    known = ", ".join(OPERATORS[name].options) or "none"
    told = f"TensorAttention: operator {name!r} has no option 'centred'; its options are: {known}."
    refused(OptionError, told, ta.TensorAttention, 96, 4, modes=3, operator=name, centred=True)


INPUTS = {
    "too few dimensions": (
        "t h w",
        (2, 4, 4, 96),
        ShapeError,
        "x has 4 dimensions, but the layout (B t h w C) has 5.\n  modes    t h w\n  x        (2, 4, 4, 96)",
    ),
    "too many dimensions": (
        2,
        (2, 4, 3, 5, 96),
        ShapeError,
        "x has 5 dimensions, but the layout (B 0 1 C) has 4.\n  modes    0 1\n  x        (2, 4, 3, 5, 96)",
    ),
    "channels": (
        "h w",
        (2, 4, 3, 95),
        ShapeError,
        "x has 95 channels, but embed_dim is 96.\n  modes    h w\n  x        (2, 4, 3, 95)   batch=(2,) h=4 w=3 C=95",
    ),
    "empty mode": (
        "h w",
        (2, 4, 0, 96),
        ShapeError,
        "mode 'w' has size 0 in x, but every mode needs at least 1 index.\n"
        "  modes    h w\n  x        (2, 4, 0, 96)   batch=(2,) h=4 w=0 C=96",
    ),
}


@every_operator
@pytest.mark.parametrize("case", INPUTS)
def test_inputs_of_the_module(variant, case, make):
    modes, shape, kind, told = INPUTS[case]
    layer = ta.TensorAttention(96, 4, modes=modes, operator=variant.name, device=make(1).device, **variant.options)
    refused(kind, f"TensorAttention: {told}", layer, make(*shape))


def test_channels_first_inputs_of_the_module(make):
    layer = ta.TensorAttention(96, 4, modes="t h w", channels_first=True, device=make(1).device)
    cases = [
        ((2, 96, 4, 4), "x has 4 dimensions, but the layout (B C t h w) has 5.", ""),
        ((2, 4, 4, 5, 96), "x has 4 channels, but embed_dim is 96.", "   batch=(2,) C=4 t=4 h=5 w=96"),
        (
            (2, 96, 4, 0, 4),
            "mode 'h' has size 0 in x, but every mode needs at least 1 index.",
            "   batch=(2,) C=96 t=4 h=0 w=4",
        ),
    ]
    for shape, rule, reading in cases:
        told = f"TensorAttention: {rule}\n  modes    t h w\n  x        {shape}{reading}"
        refused(ShapeError, told, layer, make(*shape))


def test_modes_go_by_the_names_that_the_user_gave():
    reading = "\n  modes    t h\n  x        (2, 3, 4, 8)   batch=(2,) t=3 h=4 C=8"
    layer = ta.TensorAttention(8, 2, modes="t h")
    for weights, rule in (
        ([ones(2), None], "weights of mode 't' have length 2, but the mode has size 3."),
        ([None, ones(7, 4)], "weights of mode 'h' have batch dimensions (7,), which do not broadcast to (2,)."),
        ([None, torch.zeros(4)], "weights of mode 'h' are all zero, so no index takes part."),
    ):
        told = f"TensorAttention: {rule}{reading}"
        refused(WeightsError, told, layer, ones(2, 3, 4, 8), weights=weights)
    told = "TensorAttention: mode 1 has size 0 in x, but every mode needs at least 1 index."
    told += "\n  modes    0 1\n  x        (2, 30, 0, 8)   batch=(2,) 0=30 1=0 C=8"
    refused(ShapeError, told, ta.TensorAttention(8, 2, modes=2), ones(2, 30, 0, 8))
    rule = "mode 'h' has size 0 in sizes, but every mode needs at least 1 index."
    refused(OptionError, f"plan: {rule}", ta.plan, (3, 0), modes="t h")


def test_types_of_the_module(make):
    layer = ta.TensorAttention(96, 4, modes=2, device=make(1).device)
    told = "TensorAttention: x must be floating point, got torch.int64.\n  modes    0 1\n"
    reading = "  x        (2, 4, 3, 96)   batch=(2,) 0=4 1=3 C=96"
    refused(DtypeError, told + reading, layer, make(2, 4, 3, 96, dtype=torch.int64))


def test_an_input_on_another_device_than_the_parameters():
    told = "TensorAttention: the device is cpu in x but meta in the parameters.\n  modes    0 1\n"
    reading = "  x        (2, 4, 3, 96)   batch=(2,) 0=4 1=3 C=96"
    layer = ta.TensorAttention(96, 4, modes=2, device="meta")
    refused(DtypeError, told + reading, layer, ones(2, 4, 3, 96))


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_of_the_module(case, make):
    weights, rule = WEIGHTS[case]
    rule = WHOLE.format("x") if case == "one tensor" else rule
    layer = ta.TensorAttention(8, 2, modes=2, device=make(1).device)
    reading = "\n  modes    0 1\n  x        (2, 3, 4, 8)   batch=(2,) 0=3 1=4 C=8"
    told = f"TensorAttention: {rule}{reading}"
    refused(WeightsError, told, layer, make(2, 3, 4, 8), weights=weights)


@pytest.mark.parametrize("case", VALUES)
def test_weight_values_of_the_module(case):
    weights, rule = VALUES[case]
    layer = ta.TensorAttention(8, 2, modes=2)
    reading = "\n  modes    0 1\n  x        (2, 3, 4, 8)   batch=(2,) 0=3 1=4 C=8"
    refused(WeightsError, f"TensorAttention: {rule}{reading}", layer, ones(2, 3, 4, 8), weights=weights)


# The errors themselves.


def test_errors_survive_pickling():
    with pytest.raises(ShapeError) as caught:
        ta.mode_averages(ones(5), order=2)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is ShapeError
    assert str(again) == str(caught.value)
    assert (again.rule, again.hint) == (caught.value.rule, caught.value.hint)


def test_the_cause_is_told_once():
    with pytest.raises(ShapeError) as caught:
        ta.interaction_residual(ones(5), order=2)
    assert caught.value.__suppress_context__
    assert str(caught.value).count(":") == str(caught.value).count("interaction_residual:") == 1


def test_every_class_is_a_value_error_of_the_package():
    for kind in (DtypeError, ModesError, OptionError, ShapeError, WeightsError):
        assert kind.__mro__[1:3] == (TensorAttentionError, ValueError)
        assert getattr(ta, kind.__name__) is kind
