"""What processes do that share a tensor out, for the tests of sharding: many cases in one process group.

Each case is a function of the world that raises where something is wrong; what it raised is saved, by rank and case.
"""

from __future__ import annotations

import dataclasses
import datetime
import faulthandler
import functools
import traceback
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from modules import draw
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import tensorattn as ta

SIZES = (5, 4, 6)
CLOSE = {"rtol": 1e-10, "atol": 1e-11}
WAIT = datetime.timedelta(seconds=100)  # of a process for the others, on a busy machine
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
    "clustered": {"tokens": 8, "num_kv_heads": 1},
    "clustered all": {"tokens": 200},
    "axial": {},
    "axial causal": {"causal": "h", "position_bias": lambda: ta.AlibiBias(2, modes="t h w")},
    "axial rotary": {"rotary": lambda: ta.RotaryEmbedding(6, modes="t h w", periodic=("w",))},
    "kronecker_product": {"qk_norm": True},
    "kronecker_product rotary": {"rotary": lambda: ta.RotaryEmbedding(6, modes="t h w"), "num_kv_heads": 1},
    "kronecker_sum": {"mode_projections": True},
    "kronecker_sum pool": {"pool": "sum"},
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
    """Compare outputs and all gradients of a module with those of the whole, which every process makes by itself.

    Returns the largest errors of the output, of the gradient of the input, and of those of the parameters, each as a
    share of the largest entry.
    """
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
    summed = added_up(module)
    for one, other in zip(summed, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    module.zero_grad()
    parameters = [torch.cat([grad.flatten() for grad in grads]) for grads in (summed, expected)]
    pairs = (found, box(y, modes=modes)), (part.grad, box(alone.grad, modes=modes)), parameters
    return [share_of_largest(pair) for pair in pairs]


def share_of_largest(pair):
    """The largest difference as a share of the largest entry; none where there is nothing."""
    found, expected = (tensor.detach() for tensor in pair)
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)) if found.numel() else 0.0


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
    faulthandler.dump_traceback_later(250, exit=True)
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
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
        if found[name]:  # the others wait in vain, and stop too
            break
    else:
        dist.barrier()  # nobody goes while another still talks
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def spawn(world, cases, folder):
    """Run cases in as many processes; return what each raised, by case."""
    mp.spawn(run, (world, str(folder / f"rendezvous{world}"), cases, str(folder / f"results{world}")), world)
    found = [torch.load(folder / f"results{world}.{rank}") for rank in range(world)]
    return {name: [each.get(name, "did not run") for each in found] for name, *_ in cases}


@functools.cache
def mesh_of(world, cut):
    """A mesh for some cut modes."""
    shape = (world,) if len(cut) == 1 else (world // 2, 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(f"of_{mode}" for mode in cut))


def layer_case(world, name, cut, splits, kinds):
    """A layer, as the whole, whatever is said of positions."""
    layer, mesh = make(name), mesh_of(world, cut)
    sharding = ta.Sharding(mesh, {mode: f"of_{mode}" for mode in cut}, sizes=SIZES, splits=splits)
    x = draw(2, *SIZES, 12, seed=1) + 0.3
    worst = [0.0, 0.0, 0.0]
    for kind in kinds:
        if kind == "weights of positions" and layer._needs().indices:
            continue  # it counts indices, which they do not tell
        try:
            worst = [*map(max, worst, compare(layer, sharding, x, *spoken(kind, sharding)))]
        except Exception as error:
            raise AssertionError(f"{name} cut along {cut} {splits}, {kind}") from error
    if dist.get_rank() == 0:  # shown by pytest -s
        shares = " ".join(f"{each:.0e}" for each in worst)
        print(
            f"{name:25} cut {'×'.join(cut):3} {splits or 'evenly'!s:20} {world} processes, {len(kinds)} masks: {shares}"
        )


def few_modes_case(world):
    """Where there is one mode the parts are all positions; where there are two a frame has one, and no other average."""
    for modes, sizes, name, settings in (
        ("h", (5,), "kronecker_product", {"rotary": ta.RotaryEmbedding(6, modes="h")}),
        ("h", (5,), "kronecker_sum", {"qk_norm": True}),
        ("h w", (5, 4), "kao_kv", {"causal": "h"}),
        ("h w", (5, 4), "additive", {"causal": "h", "checkpoint": True}),  # of no frame too
        ("h t w", (5, 4, 3), "truncated", {"causal": "h", "kept": (("t", "w"), ("h",))}),
    ):
        layer, x, mask = make(name, modes, **settings), draw(2, *sizes, 12, seed=1), draw(2, *sizes, seed=3) > -0.3
        for splits in (None, {"h": (*(0,) * (world - 1), 5)}):
            sharding = ta.Sharding(mesh_of(world, ("h",)), {"h": "of_h"}, sizes=sizes, splits=splits)
            part = sharding.part(ta.ModeSpec.parse(modes))
            for whole, own in (({}, {}), ({"mask": mask}, {"mask": part.box(mask, 1)})):
                try:
                    compare(layer, sharding, x, whole, own, modes)
                except Exception as error:
                    raise AssertionError(f"{name} over {modes}, {splits}, {[*whole]}") from error


def single_precision_case(world, names=tuple(LAYERS), kinds=("mask of products", "weights", "lengths")):
    """Parts with positions and without send numbers of one type in single precision too."""
    sharding = ta.Sharding(mesh_of(world, ("t",)), {"t": "of_t"}, sizes=SIZES, splits={"t": (5, *(0,) * (world - 1))})
    for name in names:
        layer, x = make(name).float(), draw(2, *SIZES, 12, dtype=torch.float32)
        for kind in kinds:
            whole, own = spoken(kind, sharding)
            found = layer(sharding.own(x, modes="t h w"), sharding=sharding, **own)
            expected = sharding.own(layer(x, **whole), modes="t h w")
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, msg=f"{name}, {kind}")


def future_case(world):
    """What a later frame holds on another process, and be it NaN, no frame before it sees."""
    sharding = ta.Sharding(mesh_of(world, ("h",)), {"h": "of_h"}, sizes=SIZES)
    clean = draw(2, *SIZES, 12)
    spoiled = clean.clone()
    spoiled[:, :, -1] = float("nan")
    frames = 3 - sharding.part(ta.ModeSpec.parse("t h w")).start[1]  # of this process that are before the last
    for name in (each for each in LAYERS if "causal" in each):
        found = [make(name)(sharding.own(x, modes="t h w"), sharding=sharding)[:, :, :frames] for x in (clean, spoiled)]
        torch.testing.assert_close(*found, **CLOSE, msg=name)


def model_of(**settings):
    """A model with checkpointing, patches and positions."""
    torch.manual_seed(0)
    told = {"patch": (1, 2, 2), "embed_dim": 12, "depth": 2, "num_heads": 2, "out_channels": 3, "checkpoint": True}
    config = ta.TensorTransformerConfig(modes="t h w", in_channels=3, **{**told, **settings})
    return ta.TensorTransformer(config).double()


def model_case(world, settings):
    """A model, with masks of patches."""
    mesh = mesh_of(world, ("t", "w") if world == 4 else ("t",))
    cut = {"t": "of_t", "w": "of_w"} if world == 4 else {"t": "of_t"}
    sizes = (5, 6, 8)
    sharding = ta.Sharding(
        mesh, cut, sizes=sizes, splits={"w": (2, 6)} if world == 4 else {"t": (*(1,) * (world - 1), 6 - world)}
    )
    model, x = model_of(**settings), draw(2, *sizes, 3, seed=2)
    mask = draw(2, 5, 3, 4, seed=3) > -0.5
    patches = sharding.patched(ta.ModeSpec.parse("t h w"), (1, 2, 2), False)
    for whole, own in (({}, {}), ({"mask": mask}, {"mask": patches.own(mask, modes="t h w")})):
        compare(model, sharding, x, whole, own)


def block_case(world):
    """A block, channels first."""
    torch.manual_seed(0)
    block = ta.TensorTransformerBlock(12, 2, modes="t h w", layer_scale=0.5, interaction="linear").double()
    sharding = ta.Sharding(mesh_of(world, ("t",)), {"t": "of_t"}, sizes=SIZES)
    compare(block, sharding, draw(2, *SIZES, 12), {"lengths": {"w": 4}}, {"lengths": {"w": 4}})


def dtensor_case(world):
    """DTensors tell how they are cut; what comes out is cut in the same way, and so are gradients."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = mesh_of(world, ("t",))
    block = ta.TensorTransformerBlock(12, 2, modes="t h w").double()
    for parameter in block.parameters():
        dist.broadcast(parameter.data, 0)
    for module, first in (
        (make("kao_qkv interaction"), False),
        (make("additive", channels_first=True), True),
        (make("flattened"), False),
        (block, False),
        (model_of(pad=True), False),
        (model_of(pad=True, out_channels=None, channels_first=True), True),
    ):
        sizes = (4, 7, *SIZES[1:])  # no process has an empty part, which a model refuses
        x = draw(*sizes, 3 if isinstance(module, ta.TensorTransformer) else 12)
        x = x.movedim(-1, 1) if first else x
        mask = None if isinstance(module, ta.TensorTransformer) else draw(*sizes, seed=1) > -0.5
        for placement in (Shard(2 if first else 1), Shard(0), Replicate()):
            alone = x.clone().requires_grad_()
            whole = module(alone, mask=mask)
            loss = draw(*whole.shape, seed=5)
            (whole * loss).sum().backward()
            spread = [placement]
            own = distribute_tensor(x.clone(), mesh, spread).requires_grad_()
            cut = mask if mask is None or placement != Shard(1) else distribute_tensor(mask, mesh, spread)
            if placement == Shard(0):
                cut = None if mask is None else distribute_tensor(mask, mesh, spread)
            if placement == Shard(2) and mask is not None:
                cut = distribute_tensor(mask, mesh, [Shard(1)])
            y = module(own, mask=cut)
            assert isinstance(y, DTensor) and tuple(y.placements) == (placement,) and y.shape == whole.shape
            torch.testing.assert_close(y.full_tensor(), whole, **CLOSE)
            (y.to_local() * distribute_tensor(loss, mesh, spread).to_local()).sum().backward()
            assert tuple(own.grad.placements) == (placement,)
            if placement != Replicate():
                torch.testing.assert_close(own.grad.full_tensor(), alone.grad, **CLOSE)
    layer, x, weights = make("additive"), draw(2, *SIZES, 12), [draw(5, seed=3).abs(), None, None]
    own, cut = (distribute_tensor(each, mesh, [Shard(dim)]) for each, dim in ((x, 1), (weights[0], 0)))
    lengths = torch.tensor([3, 5])
    y = layer(own, weights=[cut, None, None], lengths={"w": distribute_tensor(lengths, mesh, [Replicate()])})
    torch.testing.assert_close(y.full_tensor(), layer(x, weights=weights, lengths={"w": lengths}), **CLOSE)


def context_case(world):
    """Every process gets the summary of a whole context, in the same bits."""
    for name in ("additive interaction", "truncated", "flattened", "clustered"):
        layer, context = make(name), draw(2, *SIZES, 12, seed=2)
        sharding = ta.Sharding(mesh_of(world, ("t",)), {"t": "of_t"}, sizes=SIZES)
        summary = layer.summarize(sharding.own(context, modes="t h w"), sharding=sharding)
        query = draw(2, 2, 3, 4, 12, seed=6)
        torch.testing.assert_close(layer(query, summary), layer(query, context), **CLOSE)
        for _, rows in summary.key_means.blocks:
            others = [torch.empty_like(rows.contiguous()) for _ in range(world)]
            dist.all_gather(others, rows.contiguous())
            assert all(torch.equal(other, rows) for other in others)


def fsdp_case(world):
    """FSDP2 and checkpointing: losses are added, and so are gradients."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(world, ("t",))
    sizes = (7, 4, 6)
    sharding = ta.Sharding(mesh, {"t": "of_t"}, sizes=sizes)
    model, x = model_of(), draw(2, *sizes, 3, seed=2)
    y = model(x)
    loss = draw(*y.shape, seed=7)
    (y * loss).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for block in (*model.blocks, model):
        fully_shard(block, mesh=mesh)
        block.set_gradient_divide_factor(1.0)
    own = sharding.own(x, modes="t h w")
    found = model(own, sharding=sharding)
    torch.testing.assert_close(found, sharding.own(y, modes="t h w"), **CLOSE)
    (found * sharding.own(loss, modes="t h w")).sum().backward()
    for one, other in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), other, rtol=1e-9, atol=1e-9)


def traffic_case(world):
    """One collective forwards and one backwards, of S rows; another for second moments; one to meet."""
    from tensorattn.diagnose.traffic import CollectiveCounter, Sent

    mesh, share = mesh_of(world, ("t",)), (world - 1) / world
    sharding = ta.Sharding(mesh, {"t": "of_t"}, sizes=SIZES, checked=False)
    rows, own = sum(SIZES), -(-SIZES[0] // world) * SIZES[1] * SIZES[2]
    sizes = {
        "kao_kv": 4 * rows * 12,
        "kao_qkv": 4 * rows * 12,
        "additive": 4 * (rows + 1) * 12,
        "additive interaction": 4 * (rows + 1) * 12 + 8 * 144,
        "truncated": 4 * (74 + rows + 1) * 12 + 8 * 144,
    }
    for name, size in sizes.items():
        layer = make(name).float()
        part = sharding.own(draw(1, *SIZES, 12, dtype=torch.float32), modes="t h w").clone().requires_grad_()
        with CollectiveCounter() as counter:
            y = layer(part, sharding=sharding)
        expected = Sent(1 if name in ("kao_kv", "kao_qkv", "additive") else 2, 2 * share * size)
        assert counter.sent == {"all_reduce": expected}, (name, counter.sent, expected)
        with CollectiveCounter() as counter:
            y.sum().backward()
        assert counter.sent == {"all_reduce": expected}, (name, counter.sent, expected)
    meets, splits = dataclasses.replace(sharding, checked=True), {"t": (*(1,) * (world - 1), 7 - world)}
    for module, calls in ((make("kao_kv").float(), 1), (model_of(depth=3), 2)):
        wide = isinstance(module, ta.TensorTransformer)
        told = ta.Sharding(mesh, {"t": "of_t"}, sizes=(6, 6, 8), splits=splits) if wide else meets
        x = told.own(draw(1, 6, 6, 8, 3) if wide else draw(1, *SIZES, 12, dtype=torch.float32), modes="t h w")
        found = []
        for each in (told, dataclasses.replace(told, checked=False)):
            with CollectiveCounter() as counter:
                module(x, sharding=each).sum().backward()  # where layers are computed again nobody meets again
            found.append(counter.total)
        assert found[0] == (found[1].calls + calls, found[1].nbytes + calls * 48 * share), found
    with CollectiveCounter() as counter:
        make("flattened").float()(part, sharding=sharding).sum().backward()
    one = Sent(1, 4 * own * 12 * (world - 1))
    assert counter.sent == {"all_gather_into_tensor": one, "reduce_scatter_tensor": one}, counter.sent


PAPER = {  # bytes and calls forwards, of a volume of 16×24×32 with 32 channels in float32 over four processes
    "kao_kv": (13_824, 1),
    "kao_qkv": (13_824, 1),
    "additive": (14_016, 1),
    "additive interaction": (26_304, 2),  # second moments in float64, by themselves
    "kao_kv causal": (23_424, 2),
    "truncated": (333_504, 1),
    "kronecker_product": (603_648, 3),
    "kronecker_sum": (603_648, 3),
    "axial": (1_179_648, 2),
    "flattened": (1_179_648, 1),
}


def bytes_case(world):
    """What four processes send: no more than the design says, nor than gathering does."""
    from tensorattn.diagnose.traffic import CollectiveCounter

    if world != 4:
        return
    sizes = (16, 24, 32)
    sharding = ta.Sharding(mesh_of(world, ("t",)), {"t": "of_t"}, sizes=sizes, checked=False)
    part = sharding.own(torch.zeros(1, *sizes, 32), modes="t h w")
    for name, expected in PAPER.items():
        told = {"causal": "t"} if "causal" in name else {"interaction": "linear"} if "interaction" in name else {}
        layer = ta.TensorAttention(32, 1, modes="t h w", operator=name.split()[0], **told)
        with CollectiveCounter() as counter:
            layer(part, sharding=sharding)
        assert (counter.total.nbytes, counter.total.calls) == expected, (name, counter.total)


def cost_case(world):
    """What `ta.cost` says that the first process sends is what it sends, forwards and backwards."""
    from tensorattn.diagnose.traffic import CollectiveCounter

    rates = {"bandwidth": 1.0, "flop_rate": 1e12, "memory_bandwidth": 1e11}  # so slow that two are too many
    block, model = ta.TensorTransformerBlock(12, 2, modes="t h w", mlp_ratio=2).double(), model_of(checkpoint=False)
    for module, sizes in [*((make(name), SIZES) for name in LAYERS), (block, SIZES), (model, (6, 6, 8))]:
        shape, told = (2, *sizes, 3 if module is model else 12), [None]
        if dist.get_rank() == 0:
            told = [ta.cost(module, shape, world=world, training=True, **rates).roofline]
        dist.broadcast_object_list(told)
        mesh = mesh_of(world, tuple(told[0].cuts))
        assert tuple(mesh.shape) == tuple(told[0].cuts.values())
        sharding = ta.Sharding(mesh, {mode: f"of_{mode}" for mode in told[0].cuts}, sizes=sizes)
        part = sharding.own(draw(*shape), modes="t h w").requires_grad_()
        with CollectiveCounter() as counter:
            module(part, sharding=sharding).sum().backward()
        if dist.get_rank() == 0:
            assert counter.total == told[0].sent, (module, counter.total, told)


def compile_case(world):
    """One graph."""
    sharding = ta.Sharding(mesh_of(world, ("t",)), {"t": "of_t"}, sizes=SIZES)
    for name in ("kao_kv", "additive", "kao_qkv", "axial"):
        layer = make(name)
        x = sharding.own(draw(2, *SIZES, 12), modes="t h w").clone().requires_grad_()
        y = layer(x, sharding=sharding)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        found = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)(x, sharding=sharding)
        torch.testing.assert_close(found, y, **CLOSE)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], grad, **CLOSE)
    line = ta.TensorAttention(12, 2, modes="t", operator="axial").double()  # one column, of which one process has none
    own = ta.Sharding(sharding.mesh, {"t": "of_t"}, sizes=(5,))
    x = own.own(draw(2, 5, 12), modes="t")
    try:
        with torch.no_grad():
            torch.compile(line, backend="aot_eager", dynamic=False)(x, sharding=own)
    except ta.TensorAttentionError as error:
        assert error.rule == "mode 0 has 1 columns for 2 processes, which compiled code cannot exchange."
        return
    raise AssertionError("it was compiled")


def one_refuses_case(world):
    """What one process refuses, fails at or does otherwise, all raise, and go on from there together."""
    from torch.distributed.fsdp import fully_shard

    mesh, wrong = mesh_of(world, ("t",)), dist.get_rank() == 1
    sharding = ta.Sharding(mesh, {"t": "of_t"}, sizes=SIZES)
    of_model = ta.Sharding(mesh, {"t": "of_t"}, sizes=(5, 6, 8), splits={"t": (*(1,) * (world - 1), 6 - world)})
    whole = draw(2, *SIZES, 12)
    own, x = sharding.own(whole, modes="t h w"), of_model.own(draw(1, 5, 6, 8, 3), modes="t h w")
    layer, early, model, shared = make("additive"), make("additive", project="positions"), model_of(), model_of()
    block = ta.TensorTransformerBlock(12, 2, modes="t h w", checkpoint=True).double()
    for each in (*shared.blocks, shared):
        fully_shard(each, mesh=mesh)

    def no_memory(*_):
        raise RuntimeError("no memory")

    if wrong:
        early.k_proj.register_forward_pre_hook(no_memory)

    def either(bad, good):
        return bad if wrong else good

    def asked(module, what=own, told=sharding, **spoken):
        return lambda: module(what, sharding=told, **spoken)

    def without_gradient():
        with torch.set_grad_enabled(not wrong):
            return layer(own.clone().requires_grad_(), sharding=sharding)

    ones, few = own.new_ones(own.shape[1:-1]), either(own[..., :8], own)
    patches = x.new_ones(x.shape[1], 3, 4)
    mask, weights = either(ones[:, :2] > 0, ones > 0), either(-ones, ones)
    channels, size = "x has 8 channels, but embed_dim is 12.", "mode 'h' has size 2 in mask but 4 in x."
    refused = [
        (asked(layer, few), channels),
        (asked(layer, either(own.float(), own)), "the type is torch.float32 in x but torch.float64 in the parameters."),
        (asked(layer, mask=mask), size),
        (asked(layer, mask=either(ones, ones > 0)), "mask must be bool, True where a position takes part, but has the type torch.float64."),
        (asked(layer, lengths={"h": either(7, 3)}), "lengths of mode 'h' must be from 0 to its size 4, got 7."),
        (asked(layer, weights=weights), "weights must not be negative, got -1."),
        (asked(make("axial"), mask=mask), size),
        (asked(make("kronecker_sum"), few), channels),
        (asked(make("additive causal"), few), channels),
        (asked(layer.summarize, few), "context has 8 channels, but kdim is 12."),
        (asked(block, few), channels),
        (asked(block, weights=weights), "weights must not be negative, got -1."),
        (asked(model, either(x[:, :, :5], x), of_model), "mode 'h' has size 5 in x, which patches of 2 do not divide."),
        (asked(shared, either(x[:, :, :5], x), of_model), "mode 'h' has size 5 in x, which patches of 2 do not divide."),
        (asked(model, x, of_model, weights=either(-patches, patches)), "weights must not be negative, got -1."),
        (asked(early), "no memory"),
    ]  # fmt: skip
    for place, (call, rule) in enumerate(refused):
        found, told = rule_of(call), f"RuntimeError: {rule}" if rule == "no memory" else rule
        expected = rule if wrong else f"process 1 refuses the call: {told}"
        assert found == expected, (place, found, expected)
    differ = [
        (asked(layer, either(own[:1], own)), "torch.float64 of batch 2", "torch.float64 of batch 1"),
        (asked(layer, mask=either(None, ones > 0)), "the arguments mask, sharding", "the arguments sharding"),
        (asked(layer, weights=(either(None, own.new_ones(own.shape[1])), None, own.new_ones(6))), "torch.float64 (5,)", "torch.float64 (6,)"),
        (without_gradient, "torch.float64 (2, 5, 12) with a gradient", "torch.float64 (2, 5, 12)"),
    ]  # fmt: skip
    differ.append((asked(layer, lengths={"h": either(2, 3)}), "the lengths [3]", "the lengths [2]"))
    for call, one, other in differ:
        assert rule_of(call) == f"process 0 has {one} where process 1 has {other}."
    torch.testing.assert_close(layer(own, sharding=sharding), sharding.own(layer(whole), modes="t h w"), **CLOSE)


def unchecked_case(world):
    """What is compiled, or not checked, lets the others wait up to the time limit of their group, not longer."""
    groups = [dist.new_group(timeout=datetime.timedelta(seconds=3)) for _ in range(2)]
    for compiled, group in zip((True, False), groups, strict=True):
        mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("of_t",))
        sharding = ta.Sharding(mesh, {"t": "of_t"}, sizes=SIZES, checked=compiled)
        layer, own = make("additive"), sharding.own(draw(2, *SIZES, 12), modes="t h w")
        call = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False) if compiled else layer
        own = own[..., :8] if dist.get_rank() == world - 1 else own
        rule = rule_of(lambda: call(own, sharding=sharding))  # noqa: B023
        if dist.get_rank() == world - 1:
            assert compiled or rule == "x has 8 channels, but embed_dim is 12."
        else:
            assert "Timed out" in rule or "closed by peer" in rule, rule
        dist.barrier()


def rule_of(call):
    """What a call raises, in words."""
    try:
        call()
    except Exception as error:
        return getattr(error, "rule", str(error))
    raise AssertionError("not refused")


def refusals_case(world):
    """Every process refuses, before any of them waits for another."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, bare = mesh_of(world, ("t",)), init_device_mesh("cpu", (world,))
    square = mesh_of(world, ("t", "w")) if world == 4 else None
    sharding, x = ta.Sharding(mesh, {"t": "of_t"}, sizes=SIZES), draw(2, *SIZES, 12)
    own, half = sharding.own(x, modes="t h w"), make("additive")
    names = ("of_t",)
    drop = ta.TensorTransformerBlock(12, 2, modes="t h w", drop_path=0.1).double()

    def cut(splits):
        return ta.Sharding(mesh, {"t": "of_t"}, sizes=SIZES, splits=splits)

    calls = [
        (lambda: ta.Sharding(mesh, "t", sizes=SIZES), "modes must be a mapping from modes, got 't'."),
        (lambda: ta.Sharding(mesh, {"t": "rows"}, sizes=SIZES), f"the mesh has no dimension 'rows' among {names}."),
        (lambda: ta.Sharding(mesh, {"t": "of_t", "h": 0}, sizes=SIZES), "dimension 'of_t' of the mesh cuts 2 modes."),
        (lambda: ta.Sharding(None, {}, sizes=SIZES), "mesh must be a DeviceMesh, got NoneType."),
        (lambda: ta.Sharding(mesh, {"t": 0}, sizes=5), "sizes must be a sequence of integers, got 5."),
        (lambda: cut({"t": 3}), "splits of mode 't' must be a sequence of integers, got 3."),
        (lambda: sharding.own(x.numpy(), modes="t h w"), "tensor must be a torch.Tensor, got ndarray."),
        (lambda: ta.TensorTransformerBlock(12, 2, modes="t h w", mixer="mean").double()(own, sharding=sharding), "sharding has no meaning for MeanMixer, which is no attention."),
        (lambda: ta.Sharding(mesh, {}, sizes=(5, 0)), "sizes of mode 1 must be at least 1, got 0."),
        (lambda: half(own, sharding=ta.Sharding(mesh, {"z": 0}, sizes=SIZES)), "there is no mode 'z' among 't h w' (order 3)."),
        (lambda: half(own, sharding=ta.Sharding(mesh, {"t": 0}, sizes=(5, 4))), "sharding has sizes for 2 modes, but there are 3."),
        (lambda: half(own, sharding=cut({"t": (4,) * world})), f"splits of mode 't' add up to {4 * world}, but its size is 5."),
        (lambda: half(own, sharding=cut({"t": (5,) * (world + 1)})), f"splits of mode 't' has {world + 1} lengths, but {world} processes cut it."),
        (lambda: half(own, sharding=cut({"h": (4,)})), "splits names mode 'h', which is not cut."),
        (lambda: half(own, sharding=cut({"t": (-1,) * world})), "splits of mode 't' must be at least 0, got -1."),
        (lambda: half(own, sharding=mesh), "sharding must be a Sharding, got DeviceMesh."),
        (lambda: model_of()(own, sharding=mesh), "sharding must be a Sharding, got DeviceMesh."),
        (lambda: make("clustered", additive_control=True)(own, sharding=sharding), "sharding has no meaning for operator 'clustered': additive_control needs the cells of all positions at once."),
        (lambda: make("kao_qkv", dropout=0.1)(own, sharding=sharding), "sharding has no meaning with dropout in training for operator 'kao_qkv': each process would drop weights of its own from what all share."),
        (lambda: half(own, own, sharding=sharding), "context has no meaning with sharding, which is that of x."),
        (lambda: half(own, prefix=draw(2, 1, 12), sharding=sharding), "prefix has no meaning with sharding, which is that of x."),
        (lambda: drop(own, sharding=sharding), "sharding has no meaning with drop_path in training: each process would drop samples of its own."),
        (lambda: half(torch.cat([own, own, own[:, :1].new_zeros(2, 1, 4, 6, 12)], 1), sharding=sharding), f"mode 't' has size {2 * own.shape[1] + 1} in x, but this process holds {own.shape[1]} of 5."),
        (lambda: model_of()(draw(1, 5, 3, 8, 3), sharding=ta.Sharding(mesh, {"h": 0}, sizes=(5, 6, 8), splits={"h": (3, 3, *(0,) * (world - 2))})), "process 0 along mode 'h' has 3 indices, which patches of 2 do not divide."),
        (lambda: model_of()(draw(1, 5, 3, 8, 3), sharding=ta.Sharding(mesh, {"t": 0}, sizes=(5, 6, 8), splits={"t": (0, 5, *(0,) * (world - 2))})), "process 0 along mode 't' has no index, but a model needs a patch."),
        (lambda: half(distribute_tensor(x, mesh, [Shard(1)]), sharding=sharding), "sharding has no meaning with a DTensor, which tells its own."),
        (lambda: half(distribute_tensor(x, mesh, [Shard(4)])), "tensor has its channels cut along dimension 0 of the mesh."),
        (lambda: half(distribute_tensor(x, mesh, [Shard(1)]).sum(1, keepdim=True)), "tensor holds partial sums along dimension 0 of the mesh."),
    ]  # fmt: skip
    if square is not None:
        calls.append((
            lambda: half(distribute_tensor(x, square, [Shard(1), Shard(1)])),
            "mode 0 is cut along two dimensions of the mesh, 0 and 1.",
        ))  # fmt: skip
        calls.append((
            lambda: ta.Sharding(init_device_mesh("cpu", (2, 2)), {"t": 0, "h": 1}, sizes=SIZES),
            "mesh has no mesh_dim_names, which cutting more than one mode needs.",
        ))  # fmt: skip
    for place, (call, message) in enumerate(calls):
        try:
            call()
        except ta.TensorAttentionError as error:
            assert error.rule == message, (place, error.rule, message)
        else:
            raise AssertionError(f"not refused: {message}")
    assert repr(sharding) == "Sharding({'t': 'of_t'}, sizes=(5, 4, 6))"
    assert (
        repr(ta.Sharding(bare, {0: 0}, sizes=SIZES, splits={0: (5,)}))
        == "Sharding({0: 0}, sizes=(5, 4, 6), splits={0: (5,)})"
    )
