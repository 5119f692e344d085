"""What `bench` tells of several processes: the bytes that a layer sends, counted, beside formulas of full attention."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from tensorattn.cli.contenders import Work
from tensorattn.diagnose.cost import DTYPES
from tensorattn.diagnose.traffic import CollectiveCounter, Sent, sent_by_others
from tensorattn.errors import OptionError
from tensorattn.nn import TensorAttention
from tensorattn.sharding import Sharding

__all__ = ["traffic"]

Layer = tuple[str, str, dict[str, Any]]  # what it is called, its operator and options


def traffic(work: Work, layers: Sequence[Layer], world: int) -> list[tuple[str, str, str, str]]:
    """Count what layers send, forwards and backwards, where the first mode is cut over processes on this machine.

    Args:
        work: The tensor, whose device is left aside.
        layers: The layers.
        world: Number of processes.

    Returns:
        Rows of a table, the heading first.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (world, folder, work, layers), world)
        found: Mapping[str, Any] = torch.load(Path(folder) / "found")
    rows = [(f"{world} processes, one sends", "forward: bytes (calls)", "backward: bytes (calls)", "how it is known")]
    for name in found:
        sent = found[name]
        shown = [_shown(Sent(*each)) for each in sent] if isinstance(sent, list) else ["-", "-"]
        rows.append((f"  {name}", shown[0], shown[1], "counted" if isinstance(sent, list) else sent))
    itemsize = DTYPES[work.dtype].itemsize
    for name, each in sent_by_others(work.batch, work.sizes, work.dim, itemsize, world).items():
        rows.append((f"  full attention by {name}", _shown(each), "-", "formula"))
    return rows


def _shown(sent: Sent) -> str:
    """Show bytes and calls."""
    return f"{sent.nbytes:,.0f} ({sent.calls})"


def _process(rank: int, world: int, folder: str, work: Work, layers: Sequence[Layer]) -> None:
    """Run each layer once in one of the processes; the first saves what it sent."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    order, dtype, first = len(work.sizes), DTYPES[work.dtype], work.channels_first
    found: dict[str, Any] = {}
    meeting = Sent(0, 0)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("processes",))
    sharding = Sharding(mesh, {0: "processes"}, sizes=work.sizes)
    part = sharding.own(torch.empty(work.shape, dtype=dtype, device="meta"), dim=2 if first else 1)
    for name, operator, options in layers:
        told: dict[str, Any] = {"channels_first": first, "dtype": dtype, **options}
        layer = TensorAttention(work.dim, work.heads, modes=order, operator=operator, **told)
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
    if meeting.calls:  # all were refused where there was none
        found["a call of any, to refuse together"] = [tuple(meeting), (0, 0)]
    if rank == 0:
        torch.save(found, Path(folder) / "found")
    torch.distributed.barrier()  # nobody goes while another still talks
    torch.distributed.destroy_process_group()
