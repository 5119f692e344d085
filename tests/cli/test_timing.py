"""How `bench` measures: devices by name, the clock of each, memory, and calls in turn; no time is asserted."""

from __future__ import annotations

import time

import pytest
import torch

from tensorattn.cli import timing
from tensorattn.cli.timing import find_device, interleaved, machine, memory, one_thread, seconds
from tensorattn.errors import OptionError

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 1), torch.device("mps")


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What is asked of devices, none of which need be there."""
    found: list[str] = []
    for module in (torch.cuda, torch.mps):
        kind = module.__name__.removeprefix("torch.")
        monkeypatch.setattr(module, "synchronize", lambda *which, kind=kind: found.append(f"{kind}{list(which)}"))
    for clock in ("thread_time", "perf_counter"):
        monkeypatch.setattr(time, clock, lambda clock=clock: found.append(clock) or float(len(found)))
    return found


def test_devices_are_found_by_all_their_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    names = {"cpu": CPU, "cpu:0": CPU, "cuda": torch.device("cuda", 0), "cuda:1": CUDA, "mps": MPS, "mps:0": MPS}
    assert {name: find_device(name) for name in names} == names
    for name in ("cuda:2", "CPU", "xpu", ""):
        with pytest.raises(OptionError) as caught:
            find_device(name)
        here = "cpu, cuda:0, cuda:1, mps"
        assert str(caught.value) == f"--device must be one of those that are here, {here}, got {name!r}."


def test_every_device_has_its_clock(log):
    for device in (CPU, CUDA, MPS):
        seconds(device)
    assert log == ["thread_time", f"cuda[{CUDA!r}]", "perf_counter", "mps[]", "perf_counter"]


def test_time_is_read_when_the_device_has_done_all(log):
    """Also what `before` left it to do."""
    calls = {name: lambda name=name: log.append(name) for name in "ab"}
    times = interleaved(calls, repeats=2, before=lambda: log.append("-"), device=CUDA, started=lambda: log.append("|"))
    wait, sample = f"cuda[{CUDA!r}]", lambda name: [f"cuda[{CUDA!r}]", "perf_counter", name, wait, "perf_counter"]
    rounds = ["|", *(each for name in "ab" for each in ("-", *sample(name)))]
    assert log == ["|", "a", *sample("a"), "b", *sample("b"), *rounds, *rounds]
    assert times == {"a": (3.0, 0.0), "b": (3.0, 0.0)}  # each look at the clock or the device is a second here


def test_calls_are_run_in_turn_and_short_ones_repeated():
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = interleaved(calls, repeats=2, before=lambda: order.append("-"))
    counted = "".join(order)
    assert counted.startswith("aabb-") and counted.count("-") == 4
    parts = counted.split("-")[1:]
    assert [part[0] for part in parts] == ["a", "b", "a", "b"] and all(len(part) > 1 for part in parts)
    assert all(0 < median < 1e-3 and spread >= 0 for median, spread in times.values())


def test_threads_are_those_before():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_memory_is_that_of_tensors_or_of_the_allocator(log, monkeypatch):
    def call() -> torch.Tensor:
        log.append("call")
        return torch.ones(10) + 1

    assert memory(call, CPU) == memory(call, MPS) == (80, 2)
    held = iter((100, 100 + 640))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: log.append("held") or next(held))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: log.append("most") or next(held))
    log.clear()
    assert memory(call, CUDA) == (640, 2)
    wait = f"cuda[{CUDA!r}]"
    assert log == [wait, "held", "reset", "call", wait, "most", "call"]  # before another call leaves anything behind


def test_the_machine_is_described(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    told = machine(CPU)
    assert told["device"] == "cpu, CPU time of one thread" and "OMP_NUM_THREADS=1" in told["environment"]
    assert f"torch {torch.__version__}, Python " in told["versions"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    assert timing.machine(CUDA)["device"] == "cuda:1 (H200), wall time, synchronised"
