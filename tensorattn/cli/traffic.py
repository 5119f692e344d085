"""What `bench` tells of several processes: the bytes that a layer sends, counted, beside formulas of full attention."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from tensorattn.diagnose.traffic import CollectiveCounter, Sent, sent_by_others
from tensorattn.errors import OptionError
from tensorattn.nn import TensorAttention
from tensorattn.sharding import Sharding

__all__ = ["traffic"]

Layer = tuple[str, str, dict[str, Any]]  # what it is called, its operator and options


def traffic(
    batch: int, sizes: Sequence[int], channels: int, heads: int, dtype: torch.dtype, layers: Sequence[Layer], world: int
) -> list[tuple[str, str, str, str]]:
    """Count what layers send, forwards and backwards, where the first mode is cut over processes on this machine.

    Args:
        batch: Size of the batch.
        sizes: Sizes of the modes.
        channels: Number of channels.
        heads: Number of heads.
        dtype: Type of the tensor.
        layers: The layers.
        world: Number of processes.

    Returns:
        Rows of a table, the heading first.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = (world, folder, (batch, *sizes, channels), heads, dtype, layers)
        spawn(_process, told, world)
        found: Mapping[str, Any] = torch.load(Path(folder) / "found")
    rows = [(f"{world} processes, one sends", "forward: bytes (calls)", "backward: bytes (calls)", "how it is known")]
    for name in found:
        sent = found[name]
        shown = [_shown(Sent(*each)) for each in sent] if isinstance(sent, list) else ["-", "-"]
        rows.append((f"  {name}", shown[0], shown[1], "counted" if isinstance(sent, list) else sent))
    for name, each in sent_by_others(batch, sizes, channels, dtype.itemsize, world).items():
        rows.append((f"  full attention by {name}", _shown(each), "-", "formula"))
    return rows


def _shown(sent: Sent) -> str:
    """Show bytes and calls."""
    return f"{sent.nbytes:,.0f} ({sent.calls})"


def _process(
    rank: int, world: int, folder: str, shape: Sequence[int], heads: int, dtype: torch.dtype, layers: Sequence[Layer]
) -> None:
    """Run each layer once in one of the processes; the first saves what it sent."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    sizes = tuple(shape[1:-1])
    found: dict[str, Any] = {}
    meeting = Sent(0, 0)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("processes",))
    sharding = Sharding(mesh, {0: "processes"}, sizes=sizes)
    part = sharding.own(torch.empty(tuple(shape), dtype=dtype, device="meta"))
    for name, operator, options in layers:
        layer = TensorAttention(shape[-1], heads, modes=len(sizes), operator=operator, dtype=dtype, **options)
        x = torch.randn(part.shape, dtype=dtype, requires_grad=True)
        try:
            with CollectiveCounter() as forward:
                y = layer(x, sharding=sharding)
        except OptionError as cause:  # on every process alike
            found[name] = cause.rule.partition(": ")[2] or cause.rule
            continue
        with CollectiveCounter() as backward:
            y.sum().backward()
        meeting = forward.sent.pop("meeting")
        found[name] = [tuple(forward.total), tuple(backward.total)]
    found["a call of any, to refuse together"] = [tuple(meeting), (0, 0)]
    if rank == 0:
        torch.save(found, Path(folder) / "found")
    torch.distributed.destroy_process_group()
