"""The layer under the tools of PyTorch: compilation, export, tracing, transforms, autocast, derivatives of any order.

One operator of a kind is compiled by default, the others where all is tried.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from modules import draw
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.export import Dim

import tensorattn as ta
from nn.layers import DEFAULTS, GRADIENTS, HALVES, VARIANTS, compare, every_operator, gradients_of, make, more

thorough = pytest.mark.thorough
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
DYNAMIC = {"dynamic_shapes": ({place: Dim.DYNAMIC for place in range(4)},)}

# torch scripts some decompositions the first time that it differentiates forward.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def said(*sizes):
    """What may be said of positions: nothing, a mask that is no product over modes, lengths, weights of modes."""
    mask = draw(2, *sizes, seed=7) > -0.5
    lengths = torch.tensor([[1 + size // 2 for size in sizes], list(sizes)])
    weights = [torch.arange(1.0, 1 + sizes[0]), *(None for _ in sizes[1:])]
    return {"nothing": {}, "mask": {"mask": mask}, "lengths": {"lengths": lengths}, "weights": {"weights": weights}}


COMPILED = [
    *((variant, "nothing") for variant in DEFAULTS),
    *((variant, "mask") for variant in VARIANTS),
    *((VARIANTS[0], given) for given in ("lengths", "weights")),
]


def biased(**settings):
    """Layers with a bias of the logits, or with turned queries and keys."""
    relative = ta.RelativePositionBias(2, modes=2, max_distance=3).double()
    return {
        "bias": lambda: make("additive", 2, 16, position_bias=relative, **settings),
        "causal bias": lambda: make("additive", 2, 16, causal=0, position_bias=ta.AlibiBias(2, modes=2), **settings),
        "turns": lambda: make("flattened", 2, 16, rotary=ta.RotaryEmbedding(8, modes=2), **settings),
        "pooled turns": lambda: make("kronecker_sum", 2, 16, rotary=ta.RotaryEmbedding(8, modes=2), **settings),
    }


every_bias = pytest.mark.parametrize("case", biased())


# ---- compilation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", more(*COMPILED), ids=lambda case: " ".join(map(str, case)))
def test_compiles_in_one_graph(case):
    """Forwards and backwards, for every operator and option, whatever is said of positions."""
    variant, given = case
    layer, x = make(variant), draw(2, 3, 4, 8).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    spoken = said(3, 4)[given]
    compare(gradients_of(compiled, layer, x, **spoken), gradients_of(layer, layer, x, **spoken), **GRADIENTS)


@thorough
@pytest.mark.parametrize("variant", [v for v in DEFAULTS if "causal" not in v.lacks], ids=str)
def test_causal_layers_compile(variant):
    layer, x = make(variant, causal=0, channels_first=True), draw(2, 8, 3, 4).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for spoken in ({}, said(3, 4)["mask"]):
        compare(gradients_of(compiled, layer, x, **spoken), gradients_of(layer, layer, x, **spoken), **GRADIENTS)


@thorough
@every_bias
@pytest.mark.parametrize("project", ["averages", "positions"])
def test_biases_and_turns_compile(case, project):
    layer, x = biased(project=project)[case](), draw(2, 3, 4, 16).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compare(gradients_of(compiled, layer, x), gradients_of(layer, layer, x), **GRADIENTS)


@thorough
@pytest.mark.parametrize("variant", [v for v in DEFAULTS if v.operator.query == "positions"], ids=str)
def test_contexts_compile(variant):
    layer, x, context = make(variant), draw(2, 3, 5, 8), draw(2, 4, 2, 3, 8, seed=1)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    spoken = said(4, 2, 3)["mask"]
    compare(compiled(x, context, **spoken), layer(x, context, **spoken))


@thorough
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_one_graph_for_all_sizes(variant):
    layer = make(variant).eval()
    counter = CompileCounterWithBackend("aot_eager" if variant is VARIANTS[0] else "eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for sizes in ((2, 3, 5), (3, 6, 4)):
        x = draw(*sizes, 8).requires_grad_()
        compare(gradients_of(compiled, layer, x), gradients_of(layer, layer, x), **GRADIENTS)
        counts.append(counter.frame_count)
    assert 1 <= counts[0] <= 2  # a graph with floats made of sizes is handed to the backend twice
    assert variant.by_place or counts[-1] == counts[0]  # how a grid is cut depends on which mode is longest


@thorough
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in DEFAULTS and not v.by_place], ids=str)
def test_options_are_exported_for_all_sizes(variant):
    layer = make(variant).eval()
    program = torch.export.export(layer, (draw(2, 3, 5, 8),), dynamic_shapes=({n: Dim.DYNAMIC for n in range(3)},))
    for sizes in ((2, 3, 5), (3, 6, 4)):
        x = draw(*sizes, 8)
        compare(program.module()(x), layer(x))


@thorough
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # what it is made of still uses that
@pytest.mark.parametrize("variant", [v for v in DEFAULTS if v.name in ("additive", "kao_qkv", "axial")], ids=str)
def test_inductor_compiles(variant):
    layer, x = make(variant, 3, dtype=torch.float32), draw(2, 3, 4, 5, 8, dtype=torch.float32)
    compare(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-4, atol=1e-5)


# ---- export and tracing --------------------------------------------------------------------------------------


@thorough
@pytest.mark.parametrize("strict", [False, True])
@every_operator
def test_is_exported_for_all_sizes(variant, strict):
    layer = make(variant, 3, dtype=torch.float32).eval()
    program = torch.export.export(layer, (draw(2, 3, 5, 7, 8, dtype=torch.float32),), strict=strict, **DYNAMIC)
    for sizes in ((3, 7, 4, 6), (1, 2, 9, 3)):
        x = draw(*sizes, 8, dtype=torch.float32)
        compare(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)


class Masked(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, mask):
        return self.layer(x, mask=mask)


@thorough
@every_operator
def test_is_exported_with_a_mask(variant):
    """By names of dimensions with bounds, as a service would write them."""
    module, (x, mask) = Masked(make(variant)), (draw(2, 3, 4, 8), said(3, 4)["mask"]["mask"])
    batch, height = Dim("batch", min=2, max=64), Dim("height", min=2, max=512)
    shapes = {"x": {0: batch, 1: height}, "mask": {0: batch, 1: height}}
    program = torch.export.export(module, (x, mask), dynamic_shapes=shapes)
    other = draw(3, 50, 4, 8), draw(3, 50, 4) > -0.5
    compare(program.module()(*other), module(*other))


@thorough
@every_bias
@pytest.mark.parametrize("strict", [False, True])
def test_biases_and_turns_are_exported(case, strict):
    layer, x = biased()[case](), draw(2, 3, 4, 16)
    compare(torch.export.export(layer, (x,), strict=strict).module()(x), layer(x))


@thorough
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@every_operator
def test_onnx(variant, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    layer, x = make(variant, 2, dtype=torch.float32).eval(), draw(2, 3, 5, 8, dtype=torch.float32)
    shapes = {"x": {place: Dim.DYNAMIC for place in range(3)}}
    torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    for sizes in ((2, 3, 5), (3, 6, 4)):
        x = draw(*sizes, 8, dtype=torch.float32)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        compare(torch.from_numpy(found), layer(x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", more(*DEFAULTS), ids=str)
def test_is_traced(variant):
    """With gradients and without; what is traced serves other sizes too."""
    layer = make(variant).eval()
    for grad in (False, True):
        with warnings.catch_warnings(), torch.set_grad_enabled(grad):
            warnings.simplefilter("ignore")  # torch deprecates it
            traced = torch.jit.trace(layer, draw(2, 3, 4, 8))
        for sizes in ((2, 3, 4), (3, 5, 2)):
            x = draw(*sizes, 8, seed=1).requires_grad_()
            compare(gradients_of(traced, layer, x), gradients_of(layer, layer, x), **GRADIENTS)


# ---- transforms and derivatives ------------------------------------------------------------------------------


@every_operator
@pytest.mark.parametrize("given", more("mask", "nothing", "lengths"))
def test_samples_by_vmap(variant, given):
    layer, x = make(variant), draw(3, 2, 3, 4, 8)
    spoken = {name: torch.stack([value] * 3) for name, value in said(3, 4)[given].items()}
    ours = torch.vmap(lambda x, spoken: layer(x, **spoken))(x, spoken)
    theirs = [layer(part, **{name: value[0] for name, value in spoken.items()}) for part in x]
    compare(ours, torch.stack(theirs))


@every_operator
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # the fused kernel, sample by sample
def test_gradients_of_each_sample(variant):
    layer, x = make(variant), draw(3, 2, 4, 8)
    parameters = dict(layer.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(layer, parameters, (sample[None],)).square().sum()

    expected = [torch.func.grad(loss)(parameters, sample) for sample in x]
    together = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for name in parameters:
        compare(together[name], torch.stack([each[name] for each in expected]), **GRADIENTS)


@forward_mode
@pytest.mark.parametrize("variant", more(*VARIANTS, quick=len(DEFAULTS)), ids=str)
def test_forward_derivatives(variant):
    """Along a direction of the input and of all parameters, and once more of a gradient."""
    layer, x = make(variant), draw(2, 3, 4, 8)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    tangents = {name: draw(*parameter.shape, seed=5) for name, parameter in parameters.items()}

    def loss(x, parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    along, step = (draw(*x.shape, seed=4), tangents), 1e-6
    _, slope = torch.func.jvp(loss, (x, parameters), along)
    ahead, behind = (
        loss(x + s * along[0], {name: p + s * tangents[name] for name, p in parameters.items()}) for s in (step, -step)
    )
    compare(slope, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)
    of_x = torch.func.grad(lambda x: loss(x, parameters))
    _, second = torch.func.jvp(of_x, (x,), (along[0],))
    compare(second, (of_x(x + step * along[0]) - of_x(x - step * along[0])) / (2 * step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", more(*VARIANTS), ids=str)
@pytest.mark.parametrize("given", more("nothing", "mask"))
def test_second_derivatives(variant, given):
    layer, x = make(variant, 2, 2), draw(1, 2, 3, 2).requires_grad_()
    spoken = {"mask": torch.tensor([[[True, True, False], [True, False, True]]])} if given == "mask" else {}
    function = lambda x: layer(x, **spoken).tanh()  # noqa: E731
    assert gradcheck(function, (x,))
    assert gradgradcheck(function, (x,), atol=1e-4)


@every_operator
def test_gradients_that_are_differentiated(variant):
    """A penalty of the gradient reaches every parameter as it does by central differences."""
    layer, x = make(variant), draw(1, 2, 3, 8).requires_grad_()

    def penalty():
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return gradient.square().sum()

    for weight in (layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight, layer.out_proj.weight):
        (found,) = torch.autograd.grad(penalty(), weight)
        direction, step = draw(*weight.shape, seed=3), 1e-5
        losses = []
        for sign in (1, -2):
            with torch.no_grad():
                weight.add_(sign * step * direction)
            losses.append(penalty().detach())
        with torch.no_grad():
            weight.add_(step * direction)
        compare((found * direction).sum(), (losses[0] - losses[1]) / (2 * step), rtol=1e-4, atol=1e-4)


@thorough
@every_bias
def test_biases_and_turns_are_differentiated(case):
    layer, x = biased()[case](), draw(1, 2, 2, 16).requires_grad_()
    assert gradcheck(layer, (x,))
    assert gradgradcheck(layer, (x,), atol=1e-4)
    batch = draw(3, 1, 2, 2, 16, seed=1)
    compare(torch.vmap(layer)(batch), torch.stack([layer(part) for part in batch]))


# ---- types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", more(*VARIANTS, quick=len(DEFAULTS)), ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_gives_what_the_last_map_gives(variant, dtype):
    """One rule for every operator: the type of `out_proj`, that of autocast; parameters have gradients of their own."""
    layer = make(variant, 2, 16, 4, dtype=torch.float32)
    x = (0.3 * draw(2, 6, 7, 16, dtype=torch.float32)).requires_grad_()  # no softmax so sharp that rounding rules
    exact = layer(x)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        assert y.dtype == layer.out_proj(x).dtype == dtype
        assert layer(x, skip=x).dtype == torch.float32  # a skip connection is in full precision
        spoken = {"lengths": torch.tensor([[3, 7], [6, 2]])}
        assert layer(x, **spoken).dtype == layer(x.to(dtype)).dtype == dtype
    error = (y.float() - exact).abs().max()
    assert 0 < error <= 0.05 * exact.abs().max()  # not exact: something ran in half precision
    y.float().square().sum().backward()
    for gradient in (x.grad, *(parameter.grad for parameter in layer.parameters())):
        assert gradient.dtype == torch.float32 and gradient.isfinite().all()


@every_bias
@pytest.mark.parametrize("dtype", more(*HALVES), ids=str)
def test_biases_and_turns_in_half_precision(case, dtype):
    exact, x = biased()[case](), draw(2, 3, 4, 16)
    half = copy.deepcopy(exact).to(dtype)
    y = half(x.to(dtype))
    assert y.dtype == dtype
    compare(y.double(), exact(x), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype):
        y = copy.deepcopy(exact).float()(x.float())
    assert y.dtype == dtype
    compare(y.double(), exact(x), rtol=0.1, atol=0.1)


def test_autocast_with_a_mask():
    layer, x, mask = make("additive", dtype=torch.float32), draw(2, 3, 4, 8).float(), said(3, 4)["mask"]["mask"]
    with torch.autocast("cpu", torch.bfloat16):
        near = layer(x, mask=mask)
    compare(near.float(), layer(x, mask=mask), rtol=0.05, atol=0.05)
    assert (near[~mask] == 0).all()


# ---- masks and skip connections ------------------------------------------------------------------------------


@every_operator
def test_masks_in_either_layout_with_a_skip(variant):
    layer, x, mask = make(variant), draw(2, 3, 4, 8), said(3, 4)["mask"]["mask"]
    x, skip = x.masked_fill(~mask.unsqueeze(-1), torch.nan), draw(2, 3, 4, 8, seed=2)
    y = layer(x, mask=mask)
    compare(layer(x, mask=mask, skip=skip), y + skip)
    residual = layer(x, mask=mask, skip=x)
    compare(residual[mask], (x + y)[mask])
    assert residual[~mask].isnan().all()  # the skip connection is the caller's
    first = make(variant, channels_first=True)
    compare(first(x.movedim(-1, 1), mask=mask).movedim(1, -1), y)
    compare(torch.utils.checkpoint.checkpoint(layer, x, mask=mask, use_reentrant=False), y)


@every_operator
def test_dropout_leaves_absent_positions_alone(variant):
    dropout = 0.0 if "dropout_p" in variant.lacks else 0.5
    layer, x, mask = make(variant, dropout=dropout), draw(2, 3, 4, 8), said(3, 4)["mask"]["mask"]
    y = layer(x.masked_fill(~mask.unsqueeze(-1), torch.inf), mask=mask)
    assert y.isfinite().all()
    assert (y[~mask] == 0).all()
