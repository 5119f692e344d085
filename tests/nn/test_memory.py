"""Memory: what is kept for the backward pass, with checkpoints and without, and the peak where nothing is kept."""

from __future__ import annotations

import pytest
import torch
from modules import draw

import tensorattn as ta
from nn.layers import CAUSAL, DEFAULTS, GRADIENTS, VARIANTS, compare, make, more
from tensorattn.diagnose.cost import count

MB = 1 << 20


def kept(module, x):
    """Bytes that are kept between the passes beside the input and the parameters, as a multiple of the input."""
    known, found = {t.untyped_storage()._cdata for t in (x, *module.parameters())}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(found.values()) / x.nbytes


def seeded(module, x):
    """Output and gradients, with random numbers always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = module(x)
        gradients = torch.autograd.grad((y * draw(*y.shape, seed=9, dtype=y.dtype)).sum(), [x, *module.parameters()])
        return y, gradients


def layers(variant, **settings):
    return [make(variant, 3, 16, 4, torch.float32, checkpoint=c, **settings) for c in (False, True)]


def blocks(variant, **settings):
    options = {"modes": 3, "operator": variant.name, **variant.options, **settings}
    built = [ta.TensorTransformerBlock(16, 4, checkpoint=c, **options) for c in (False, True)]
    built[1].load_state_dict(built[0].state_dict())
    return built


def models(variant, **settings):
    config = {"modes": 3, "in_channels": 16, "embed_dim": 16, "depth": 2, "num_heads": 4, "operator": variant.name}
    options = {**variant.options, **settings}
    built = [
        ta.TensorTransformer(ta.TensorTransformerConfig(**config, checkpoint=c, options=options)) for c in (False, True)
    ]
    built[1].load_state_dict(built[0].state_dict())
    return built


CASES = [*((layers, variant) for variant in VARIANTS), *((b, v) for b in (blocks, models) for v in VARIANTS)]
QUICK = [(b, v) for b, v in CASES if (v in DEFAULTS and b is layers) or v is VARIANTS[0]]


@pytest.mark.parametrize(
    ("build", "variant"),
    [
        pytest.param(*case, id=f"{case[0].__name__}-{case[1]}", marks=() if case in QUICK else pytest.mark.thorough)
        for case in CASES
    ],
)
class TestCheckpoint:
    def test_keeps_less(self, variant, build):
        """A layer the averages and an output or two, a block and each block of a model their input."""
        x = draw(1, 8, 16, 16, 16, dtype=torch.float32).requires_grad_()
        plain, less = (kept(module, x) for module in build(variant))
        most = {"layers": 1.5, "blocks": 0.01, "models": 6}[build.__name__]
        assert less <= most
        assert less < plain / 2 or plain < 0.2  # queries that are averages are few from the start

    def test_changes_no_number(self, variant, build):
        x = draw(2, 3, 4, 2, 16, dtype=torch.float32).requires_grad_()
        compare(
            *(seeded(module, x) for module in build(variant, dropout=0.0 if "dropout_p" in variant.lacks else 0.3)),
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize("variant", more(*CAUSAL, quick=2), ids=str)
def test_causal_checkpoints_change_no_number(variant):
    x = draw(2, 3, 4, 2, 16, dtype=torch.float32).requires_grad_()
    compare(*(seeded(module, x) for module in layers(variant, causal=1, channels_first=False)), rtol=1e-5, atol=1e-6)


def test_checkpoints_are_differentiated_twice():
    plain, less = (make("additive", checkpoint=checkpoint) for checkpoint in (False, True))
    x = draw(1, 2, 3, 8).requires_grad_()
    found = []
    for layer in (plain, less):
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), [x, layer.v_proj.weight]))
    compare(*found, **GRADIENTS)


LOOPED = [v for v in VARIANTS if v.operator.query == "positions" and v.name in ("additive", "truncated", "kao_kv")]
SMALL = [v for v in LOOPED if str(v) in ("additive", "kao_kv")]
LARGE = [v for v in LOOPED if v not in SMALL and not v.options.get("include_self")]


@pytest.mark.parametrize("variant", more(*SMALL, *LARGE, quick=2), ids=str)
@pytest.mark.parametrize("channels_first", more(False, True))
def test_the_peak_without_gradients(variant, channels_first):
    """At 65,536 positions: the output, as much as the input once more, and 8 MB; the output is the same as at once."""
    layer = make(variant, 3, 32, 4, torch.float32, channels_first=channels_first)
    x = draw(1, *((32, 16, 64, 64) if channels_first else (16, 64, 64, 32)), dtype=torch.float32)
    at_once = layer(x).detach()
    with torch.no_grad():
        outputs = []
        peak = count(lambda: outputs.append(layer(x))).peak
    assert peak <= 2 * x.nbytes + 8 * MB
    assert count(lambda: layer(x)).peak > 3 * x.nbytes
    compare(outputs[0], at_once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("project", ["averages", "positions"])
def test_small_chunks_are_the_whole(project):
    """Queries of full attention go in chunks of a few where each has many logits."""
    layer, x = make("flattened", 1, dtype=torch.float32, project=project), draw(1, 9000, 8, dtype=torch.float32)
    with torch.no_grad():
        outputs = []
        peak = count(lambda: outputs.append(layer(x))).peak
    assert peak < 64 * MB < 9000 * 9000 * 4
    few = torch.tensor([0, 77, 4500, 8999])
    context = layer(x[:, few].clone(), x)
    compare(outputs[0][:, few], context, rtol=1e-4, atol=1e-5)
