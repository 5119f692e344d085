"""The layer among the tools that replace, watch or wrap its linear maps: it calls them, whatever stands in their place.

An operator that works on averages calls its maps with averaged rows, another with positions: to an affine map that is
one and the same.
"""

from __future__ import annotations

import copy
import datetime
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import tensorattn as ta

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
SECONDS = 120  # that processes may take together
LAYERS: dict[str, dict[str, Any]] = {
    **{name: {"operator": name} for name in ta.OPERATORS},
    "additive, interaction": {"operator": "additive", "interaction": "linear"},
    "truncated, interaction": {"operator": "truncated", "interaction": "linear"},
    "kao_qkv, interaction": {"operator": "kao_qkv", "centered": True, "interaction": "linear"},
    "kronecker_sum, mode_projections": {"operator": "kronecker_sum", "mode_projections": True},
    "additive, causal": {"operator": "additive", "causal": "t"},
    "without biases": {"operator": "kao_kv", "bias": False},
}


def layers(*quick: str) -> pytest.MarkDecorator:
    """Try all layers, by default those of every operator or those named."""
    named = quick or tuple(ta.OPERATORS)
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in named else pytest.mark.thorough) for name in LAYERS]
    )


def make(name: str, dtype: torch.dtype = torch.float64) -> ta.TensorAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ta.TensorAttention(16, 4, modes="t h w", dtype=dtype, **LAYERS[name])


def draw(seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 2, 3, 4, 16, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def projections(layer: nn.Module) -> dict[str, nn.Linear]:
    """Every linear map of a layer, by its name."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def replace(layer: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(layer.get_submodule(parent), last, module)


def doubled(layer: nn.Module, name: str) -> nn.Module:
    """The layer with one of its linear maps twice as large."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twin.get_submodule(name).parameters():
            parameter.mul_(2)
    return twin


def train(layer: nn.Module, steps: int = 2, rate: float = 1e-2) -> list[float]:
    """Train a layer for some steps to give what it was given, and return the losses."""
    x, losses = draw(), []
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


# ---- hooks ---------------------------------------------------------------------------------------------------


@layers()
def test_forward_hooks_run_on_every_projection(name):
    layer, ran = make(name), set()
    for place, module in projections(layer).items():
        module.register_forward_hook(lambda *_, place=place: ran.add(place))
        module.register_forward_pre_hook(lambda *_, place=place: ran.add(f"before {place}"))
    layer(draw())
    assert ran == {f"{when}{place}" for place in projections(layer) for when in ("", "before ")}


@layers()
def test_what_a_hook_makes_of_a_projection_reaches_the_output(name):
    x = draw()
    for place in projections(make(name)):
        layer = make(name)
        layer.get_submodule(place).register_forward_hook(lambda module, args, output: 2 * output)
        torch.testing.assert_close(layer(x), doubled(make(name), place)(x), **CLOSE)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # a map that is asked for its linear part
@layers("additive")
def test_backward_hooks_run_on_every_projection(name):
    layer, ran = make(name), set()
    for place, module in projections(layer).items():
        module.register_full_backward_hook(lambda *_, place=place: ran.add(place))
    layer(draw().requires_grad_()).sum().backward()
    assert ran == set(projections(layer))


# ---- other maps in their place -------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@layers()
def test_a_subclass_with_a_forward_of_its_own_is_used(name):
    x = draw()
    for place, module in projections(make(name)).items():
        layer = make(name)
        other = Doubled(
            module.in_features, module.out_features, bias=module.bias is not None, dtype=module.weight.dtype
        )
        other.load_state_dict(module.state_dict())
        replace(layer, place, other)
        torch.testing.assert_close(layer(x), doubled(make(name), place)(x), **CLOSE)


class LowRank(nn.Module):
    """An affine map without a weight: two maps, one after the other."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@layers("additive", "axial")
def test_a_map_without_a_weight_takes_the_place_of_a_linear_one(name):
    x = draw()
    for place, module in projections(make(name)).items():
        layer, expected = make(name), make(name)
        if module.bias is None:
            continue  # what follows has one
        first, second = nn.Linear(16, 3, dtype=x.dtype), nn.Linear(3, module.out_features, dtype=x.dtype)
        replace(layer, place, LowRank(first, second))
        with torch.no_grad():
            expected.get_submodule(place).weight.copy_(second.weight @ first.weight)
            expected.get_submodule(place).bias.copy_(second.weight @ first.bias + second.bias)
        torch.testing.assert_close(layer(x), expected(x), **CLOSE)


@layers()
def test_pruned_layers_train(name):
    layer = make(name)
    for module in projections(layer).values():
        prune.l1_unstructured(module, "weight", 0.3)
    masks = {place: module.weight_mask.clone() for place, module in projections(layer).items()}
    first, second = train(layer)
    assert second < first
    for place, module in projections(layer).items():
        assert int((masks[place] == 0).sum()) == round(0.3 * module.weight.numel())
        assert (module.weight_orig.grad[masks[place] == 0] == 0).all() and module.weight_orig.grad.any()
        prune.remove(module, "weight")
        assert (module.weight[masks[place] == 0] == 0).all()


class Scaled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@layers("additive", "kao_qkv", "additive, interaction")
def test_parametrized_layers_train(name):
    x, plain = draw(), make(name)
    for place in projections(plain):
        layer, expected = make(name), make(name)
        parametrize.register_parametrization(layer.get_submodule(place), "weight", Scaled())
        with torch.no_grad():
            expected.get_submodule(place).weight.mul_(2)
        torch.testing.assert_close(layer(x), expected(x), **CLOSE)
    for norm in (parametrizations.weight_norm, parametrizations.spectral_norm):
        layer = make(name)
        for module in projections(layer).values():
            norm(module)
        if norm is parametrizations.weight_norm:
            torch.testing.assert_close(layer(x), plain(x), **CLOSE)  # it changes what is trained, not what is computed
        first, second = train(layer)
        assert second < first
        for parameter in layer.parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all()


@layers("additive", "axial")
def test_maps_of_eight_bits_run(name):
    if not torch.backends.quantized.supported_engines or torch.backends.quantized.engine == "none":
        pytest.skip("no engine for maps of eight bits here")
    layer, x = make(name, torch.float32).eval(), draw(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})
        with torch.no_grad():
            near, exact = quantized(x), layer(x)
    assert not projections(quantized) and near.dtype == torch.float32
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.1  # one softmax a mode: the rounding of each adds up


# ---- parameters from elsewhere -------------------------------------------------------------------------------


@layers()
def test_functional_call_takes_the_parameters_that_it_is_given(name):
    layer, other, x = make(name), copy.deepcopy(make(name)), draw()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    given = {key: parameter.detach().clone().requires_grad_() for key, parameter in other.named_parameters()}
    output = torch.func.functional_call(layer, given, (x,))
    torch.testing.assert_close(output, other(x), **CLOSE)
    assert not torch.allclose(output, layer(x))
    output.square().sum().backward()
    other(x).square().sum().backward()
    for key, parameter in other.named_parameters():
        torch.testing.assert_close(given[key].grad, parameter.grad, **CLOSE)
    assert all(parameter.grad is None for parameter in layer.parameters())


@layers("additive")
def test_an_ensemble_is_one_vectorized_call(name):
    members, x = [make(name) for _ in range(3)], draw()
    with torch.no_grad():
        for number, member in enumerate(members):
            for parameter in member.parameters():
                parameter.mul_(1 + number)
    parameters, buffers = torch.func.stack_module_state(members)
    together = torch.vmap(lambda *state: torch.func.functional_call(members[0], state, (x,)))(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([member(x) for member in members]), **CLOSE)


@layers("additive")
def test_a_round_trip_through_safetensors(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer, other, x = make(name), make(name), draw()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1)
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x), layer(x))
    safetensors.save_model(layer, str(tmp_path / "model.safetensors"))
    again = make(name)
    assert safetensors.load_model(again, str(tmp_path / "model.safetensors")) == (set(), [])
    assert torch.equal(again(x), layer(x))


# ---- adapters of low rank ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


def adapted(peft, layer, **settings):
    """The layer with a random adapter of rank 4 on each of its linear maps."""
    maps = sorted(projections(layer))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=maps, init_lora_weights=False, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return peft.get_peft_model(layer, config).to(torch.float64)


@layers("additive", "kao_kv", "kao_qkv")
def test_adapters_act_and_have_gradients_and_train(name, peft):
    x, plain = draw(), make(name)
    model = adapted(peft, make(name))
    adapters = {key: parameter for key, parameter in model.named_parameters() if "lora_" in key}
    assert len(adapters) == 2 * len(projections(plain))
    assert all(parameter.requires_grad == (key in adapters) for key, parameter in model.named_parameters())
    assert not torch.allclose(model(x), plain(x))
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain(x), **CLOSE)
    losses = train(model, steps=5)
    assert losses[-1] < losses[0]
    for key, parameter in adapters.items():
        assert parameter.grad is not None and parameter.grad.any(), key
    base = model.get_base_model()
    for place, module in projections(plain).items():
        assert torch.equal(base.get_submodule(place).base_layer.weight, module.weight)


@layers("additive", "kao_kv", "kao_qkv")
def test_every_adapter_is_seen_in_the_output(name, peft):
    x, plain = draw(), make(name)
    for place in projections(plain):
        model = adapted(peft, make(name))
        for key, parameter in model.named_parameters():
            if "lora_B" in key and f".{place}." not in key:
                parameter.data.zero_()
        assert not torch.allclose(model(x), plain(x)), place


@layers("additive", "kao_kv", "kao_qkv")
def test_merged_adapters_are_the_same_layer(name, peft):
    x, model = draw(), adapted(peft, make(name))
    apart = model(x)
    merged = model.merge_and_unload()
    assert isinstance(merged, ta.TensorAttention) and set(projections(merged)) == set(projections(make(name)))
    torch.testing.assert_close(merged(x), apart, **CLOSE)


@layers("additive")
def test_adapters_with_a_norm_of_their_own_merge_too(name, peft):
    """DoRA rescales the rows of the weight: still a linear map, though one that is computed in another way."""
    x, model = draw(), adapted(peft, make(name), use_dora=True)
    apart = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), apart, **CLOSE)


@pytest.mark.thorough
def test_an_adapter_that_drops_channels_trains(peft):
    model = adapted(peft, make("additive"), lora_dropout=0.5).train()
    losses = train(model, steps=2)
    assert all(loss == loss for loss in losses)
    x = draw()
    assert torch.equal(model.eval()(x), model(x))


# ---- sharded parameters --------------------------------------------------------------------------------------


def shard_and_compare(rank: int, world: int, store: str) -> None:
    """One process of several: layers whose parameters they share give and learn what one process does."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    for name in LAYERS:
        layer, whole, x = make(name), make(name), draw()
        for module in projections(layer).values():
            fully_shard(module, mesh=mesh)
        fully_shard(layer, mesh=mesh)
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (layer, whole)]
        for _ in range(2):
            outputs = [each(x) for each in (layer, whole)]
            torch.testing.assert_close(*outputs, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
            for output, optimizer in zip(outputs, optimizers, strict=True):
                optimizer.zero_grad()
                output.square().mean().backward()
            for (key, shared), (_, own) in zip(layer.named_parameters(), whole.named_parameters(), strict=True):
                assert shared.grad is not None, f"{name}: {key}"
                torch.testing.assert_close(shared.grad.full_tensor(), own.grad, **CLOSE)
            for optimizer in optimizers:
                optimizer.step()
    dist.destroy_process_group()


@pytest.mark.thorough
@pytest.mark.parametrize("world", [1, 2])
def test_sharded_layers_are_as_unsharded_ones(world, tmp_path):
    processes = mp.spawn(shard_and_compare, (world, str(tmp_path / "store")), nprocs=world, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in processes.processes:
            process.kill()
