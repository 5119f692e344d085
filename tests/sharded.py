"""What processes do that share a tensor out, for the tests of sharding: many cases in one process group.

Each case is a function of the world that raises where something is wrong; what it raised is saved, by rank and case.
"""

from __future__ import annotations

import datetime
import faulthandler
import traceback
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from modules import draw
from torch.distributed.device_mesh import init_device_mesh

import tensorattn as ta

SIZES = (5, 4, 6)
CLOSE = {"rtol": 1e-10, "atol": 1e-11}
WAIT = datetime.timedelta(seconds=60)
LAYERS = {
    "additive": {},
    "additive interaction": {"interaction": "linear"},
    "additive include_self": {"include_self": True},
    "additive bias": {"position_bias": lambda: ta.RelativePositionBias(2, modes="t h w", max_distance=3)},
    "additive grouped": {"num_kv_heads": 1, "qk_norm": True, "head_dim": 4},
    "additive checkpoint": {"checkpoint": True},
    "additive positions": {"project": "positions"},
    "additive causal": {"causal": "h", "interaction": "linear"},
    "truncated": {"interaction": "linear"},
    "truncated causal": {"kept": (("t",), ("w",), ("t", "h")), "causal": "h"},
    "kao_kv": {},
    "kao_kv causal": {"causal": "h"},
    "kao_qkv": {},
    "kao_qkv interaction": {"centered": True, "interaction": "linear"},
    "kao_qkv positions": {"centered": True, "project": "positions", "qk_norm": True},
    "clustered blocks": {"cells": "blocks", "tokens": 8},
    "clustered causal": {"cells": "blocks", "tokens": 8, "causal": "h"},
    "clustered rotary": {"cells": "blocks", "tokens": 8, "rotary": lambda: ta.RotaryEmbedding(6, modes="t h w")},
    "clustered held": {"tokens": 5},
    "flattened": {},
    "flattened rotary": {"rotary": lambda: ta.RotaryEmbedding(6, modes="t h w", periodic=("w",)), "qk_norm": True},
    "flattened causal": {"causal": "h", "position_bias": lambda: ta.AlibiBias(2, modes="t h w")},
}


def make(name, modes="t h w", channels=12, **settings):
    """A layer whose maps have biases, the same on every process."""
    torch.manual_seed(0)
    options = {key: value() if callable(value) else value for key, value in LAYERS.get(name, {}).items()}
    layer = ta.TensorAttention(channels, 2, modes=modes, operator=name.split()[0], **options, **settings).double()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.add_(0.2 * draw(*parameter.shape, seed=seed))
    if "held" in name:
        layer.hold_cells(layer.find_cells(draw(1, 3, 4, 5, 12, seed=9)))
    return layer


def added_up(module):
    """Gradients of the parameters, added up over all processes."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
    for grad in grads:
        dist.all_reduce(grad)
    return grads


def compare(module, sharding, x, whole, own, modes="t h w"):
    """Compare outputs and all gradients of a module with those of the whole, which every process makes by itself."""
    alone = x.clone().requires_grad_()
    y = module(alone, **whole)
    loss = draw(*y.shape, seed=7)
    (y * loss).sum().backward()
    expected = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    part = sharding.own(x, modes=modes).clone().requires_grad_()
    found = module(part, sharding=sharding, **own)
    box = sharding.own if y.shape[1:-1] == x.shape[1:-1] else None
    torch.testing.assert_close(found, box(y, modes=modes), **CLOSE)
    (found * box(loss, modes=modes)).sum().backward()
    torch.testing.assert_close(part.grad, box(alone.grad, modes=modes), **CLOSE)
    for one, other in zip(added_up(module), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    module.zero_grad()


def spoken(kind, sharding):
    """What is said of the whole, and of the own box."""
    part = sharding.part(ta.ModeSpec.parse("t h w"))

    def box(tensor, batch):
        return part.box(tensor, batch)

    if kind == "nothing":
        return {}, {}
    if kind == "any mask":
        mask = draw(2, *SIZES, seed=3) > -0.3
        return {"mask": mask}, {"mask": box(mask, 1)}
    if kind == "mask of products":  # a product on each process, but not in the whole
        mask = torch.ones(SIZES, dtype=torch.bool)
        mask[:3, :, :2] = False
        mask[3:, :2] = False
        return {"mask": mask}, {"mask": box(mask, 0)}
    if kind == "lengths":
        lengths = torch.tensor([[5, 3, 2], [2, 4, 6]])
        return {"lengths": lengths}, {"lengths": lengths}
    if kind == "lengths and mask":
        mask, lengths = draw(2, *SIZES, seed=3) > -0.3, {"t": torch.tensor([1, 5])}
        return {"mask": mask, "lengths": lengths}, {"mask": box(mask, 1), "lengths": lengths}
    if kind == "weights":  # zero on some processes
        weights = [torch.tensor([0.0, 0.0, 0.0, 2.0, 1.0]), None, draw(2, 6, seed=4).abs()]
        own = [None if v is None else part.own(v, mode, -1) for mode, v in enumerate(weights)]
        return {"weights": weights}, {"weights": own}
    weights = draw(2, *SIZES, seed=5).abs()
    weights[:, :3] = 0
    return {"weights": weights}, {"weights": box(weights, 1)}


KINDS = ("nothing", "any mask", "mask of products", "lengths", "lengths and mask", "weights", "weights of positions")


def run(rank, world, file, cases, results):
    """Join the group, and run all cases."""
    faulthandler.dump_traceback_later(150, exit=True)
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=WAIT)
    found = {}
    for case in cases:
        name, function, *arguments = case
        try:
            function(world, *arguments)
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
        torch.save(found, f"{results}.{rank}")
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def spawn(world, cases, folder):
    """Run cases in as many processes; return what each raised, by case."""
    mp.spawn(run, (world, str(folder / f"rendezvous{world}"), cases, str(folder / f"results{world}")), world)
    found = [torch.load(folder / f"results{world}.{rank}") for rank in range(world)]
    return {name: [each.get(name, "did not run") for each in found] for name, *_ in cases}


def mesh_of(world, cut):
    """A mesh for some cut modes."""
    shape = (world,) if len(cut) == 1 else (world // 2, 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(f"of_{mode}" for mode in cut))


def layer_case(world, name, cut, splits, kinds):
    """A layer, as the whole, whatever is said of positions."""
    layer, mesh = make(name), mesh_of(world, cut)
    sharding = ta.Sharding(mesh, {mode: f"of_{mode}" for mode in cut}, sizes=SIZES, splits=splits)
    x = draw(2, *SIZES, 12, seed=1) + 0.3
    for kind in kinds:
        if kind == "lengths and mask" and name.startswith("clustered"):
            pass
        if name.startswith("kao_kv") and kind == "weights of positions":
            continue
        if name == "kao_qkv" and kind == "weights of positions":
            continue
        try:
            compare(layer, sharding, x, *spoken(kind, sharding))
        except Exception as error:
            raise AssertionError(f"{name} cut along {cut} {splits}, {kind}") from error
