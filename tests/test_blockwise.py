"""A tensor larger than memory: chunks give what the whole gives, in little memory, and what was stopped goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from modules import draw

import tensorattn as ta
from tensorattn import blockwise

SIZES = (4, 5, 6)
CHUNKS = [1, {"t": 3}, {"t": 2, "w": 4}, None]
LAYERS = {
    "additive": {},
    "additive interaction": {"interaction": "linear"},
    "additive include_self": {"include_self": True},
    "additive bias": {
        "position_bias": lambda: ta.RelativePositionBias(2, modes="t h w", max_distance=3, dtype=torch.float64)
    },
    "additive grouped": {"num_kv_heads": 1, "qk_norm": True},
    "additive causal": {"causal": "w", "interaction": "linear"},
    "truncated": {"interaction": "linear"},
    "truncated causal": {"kept": (("t",), ("h",), ("t", "w")), "causal": "w"},
    "kao_kv": {},
    "kao_kv causal": {"causal": "w"},
    "kao_qkv": {},
    "kao_qkv interaction": {"centered": True, "interaction": "linear"},
    "kao_qkv positions": {"centered": True, "project": "positions"},
    "clustered blocks": {"cells": "blocks", "tokens": 8},
    "clustered causal": {"cells": "blocks", "tokens": 8, "causal": "w"},
    "clustered rotary": {"cells": "blocks", "tokens": 8, "rotary": lambda: ta.RotaryEmbedding(6, modes="t h w")},
    "clustered held": {"tokens": 5},
}


def make(name, **settings):
    """A layer of 12 channels whose maps have biases."""
    options = {key: value() if callable(value) else value for key, value in LAYERS.get(name, {}).items()}
    layer = ta.TensorAttention(
        12, 2, modes="t h w", operator=name.split()[0], dtype=torch.float64, **options, **settings
    )
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.add_(0.2 * draw(*parameter.shape, seed=seed))
    if "held" in name:
        layer.hold_cells(layer.find_cells(draw(1, 3, 4, 5, 12, seed=9)))
    return layer


def of_whole(layer, source, **spoken):
    """What the layer gives for the whole."""
    with torch.no_grad():
        return layer(torch.tensor(source).unsqueeze(0), **spoken).squeeze(0).numpy()


@pytest.mark.parametrize("name", LAYERS)
def test_chunks_give_what_the_whole_gives(name):
    layer, source = make(name), draw(*SIZES, 12).numpy() + 0.3
    whole = of_whole(layer, source)
    for chunks in CHUNKS:
        if "causal" in name and isinstance(chunks, dict):
            chunks = {"t": chunks["t"], "h": 2}
        sink = np.full_like(source, np.nan)
        ta.attend_blockwise(layer, source, sink, chunks=chunks)
        np.testing.assert_allclose(sink, whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["additive interaction", "kao_qkv", "kao_kv causal", "clustered blocks"])
def test_masks(name):
    layer, source = make(name), draw(*SIZES, 12).numpy()
    mask = draw(*SIZES, seed=1).numpy() > -0.5
    mask[0] = False
    whole = of_whole(layer, source, mask=torch.tensor(mask))
    source[~mask] = np.nan
    for chunks in ({"t": 1, "h": 2}, None):
        sink = np.full_like(source, np.nan)
        ta.attend_blockwise(layer, source, sink, chunks=chunks, mask=mask)
        np.testing.assert_allclose(sink, whole, rtol=1e-11, atol=1e-12)


def test_default_chunks(monkeypatch):
    layer = make("additive causal")
    cut = [blockwise._chunk_lengths(layer, None, (64, 90, 100), 12)]
    monkeypatch.setattr(blockwise, "CHUNK", 1200)
    cut += [blockwise._chunk_lengths(layer, None, sizes, 12) for sizes in ((4, 5, 6), (9, 25, 5), (9, 200, 1))]
    assert cut == [(38, 90, 100), (3, 5, 6), (1, 20, 5), (1, 100, 1)]
    sink = np.full((*SIZES, 12), np.nan)
    source = draw(*SIZES, 12).numpy()
    ta.attend_blockwise(layer, source, sink)
    np.testing.assert_allclose(sink, of_whole(layer, source), rtol=1e-11, atol=1e-12)


def test_layouts_and_types():
    layer, numbers = make("additive"), (100 * draw(*SIZES, 12)).numpy().astype(np.int16)
    whole = of_whole(layer, numbers.astype(np.float64))
    for place in (0, 2, -1):
        source = np.moveaxis(numbers, -1, place).astype(">i2")
        sink = np.zeros(source.shape, ">f8")
        ta.attend_blockwise(layer, source, sink, chunks={"h": 2}, channel_mode=place)
        np.testing.assert_allclose(np.moveaxis(sink, place, -1), whole, rtol=1e-9, atol=1e-9)  # logits of thousands
    half = torch.tensor(numbers / 100).bfloat16().requires_grad_()
    sink = np.zeros(half.shape)
    ta.attend_blockwise(layer, half, sink, chunks={"h": 2})
    np.testing.assert_allclose(sink, of_whole(layer, half.detach().double().numpy()), rtol=1e-11, atol=1e-12)
    torch.manual_seed(0)
    one = ta.TensorAttention(1, 1, modes="t h w", channels_first=True)
    source, sink = numbers[..., 0] // 50, np.zeros(SIZES, np.float32)
    ta.attend_blockwise(one, source, sink, chunks=2, channel_mode=None)
    with torch.no_grad():
        np.testing.assert_allclose(sink, one(torch.tensor(source)[None, None].float())[0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="no engine for maps of eight bits here")
def test_quantised_maps_have_no_parameters(tmp_path):
    layer = torch.ao.quantization.quantize_dynamic(make("additive").float().eval(), {torch.nn.Linear})
    source = draw(*SIZES, 12).numpy()
    sink = np.zeros_like(source)
    ta.attend_blockwise(layer, source, sink, chunks=9, state=tmp_path / "state")
    np.testing.assert_allclose(sink, of_whole(layer, source.astype(np.float32)), rtol=1e-4, atol=1e-4)


def test_sums_of_many_chunks_are_accurate():
    """A sum of 4,096 parts in float32, one by one, would be off by about 1e-5."""
    source = (draw(4096, 2, 4, dtype=torch.float32) + 30).numpy()
    layer = ta.TensorAttention(4, 1, modes=2, operator="kao_kv")
    sink = np.zeros_like(source)
    run = blockwise._Run(blockwise._Files(layer, source, sink, None, -1), (4096, 2), [], None, False)
    with torch.no_grad():
        for start in range(4096):
            x, weights = run.files.read(((start, 1), (0, 2)))
            run.asked = 0
            layer.add_up(x, run._in_whole(weights, ((start, 1), (0, 2))))
    columns = run.sums[0][1]
    np.testing.assert_allclose(columns.squeeze(0).numpy(), source.astype(np.float64).mean(0), rtol=1e-7)


class Array:
    """An array as zarr and h5py have them; the sink fails when it was written some times."""

    def __init__(self, array, lives=10**9):
        self.array, self.attrs, self.lives, self.read, self.written = array, {}, lives, [], []
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, places):
        self.read.append(places[0].start)
        return self.array[places]

    def __setitem__(self, places, values):
        if not self.lives:
            raise OSError("no space left on device")
        self.lives -= 1
        self.written.append(places[0].start)
        self.array[places] = values


def test_what_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(blockwise, "SECONDS", 0)
    layer, source, state = make("additive interaction"), Array(draw(*SIZES, 12).numpy()), tmp_path / "state"
    sink = Array(np.full((*SIZES, 12), np.nan), lives=2)
    with pytest.raises(OSError, match="no space") as error:
        ta.attend_blockwise(layer, source, sink, chunks={"t": 1}, state=state)
    assert error.value.__notes__ == ["The sink is incomplete: 2 of 4 chunks are written."]
    assert sink.attrs == {"incomplete": True} and state.exists()
    source.read, sink.lives = [], 9
    ta.attend_blockwise(layer, source, sink, chunks={"t": 1}, state=state)
    assert source.read == [0, 1, 2, 3] and sink.written == [0, 1, 2, 3]
    assert sink.attrs == {} and list(tmp_path.iterdir()) == []
    np.testing.assert_allclose(sink.array, of_whole(layer, source.array), rtol=1e-11, atol=1e-12)


def test_reading_that_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(blockwise, "SECONDS", 0)
    layer, whole, state = make("kao_kv"), draw(*SIZES, 12).numpy(), tmp_path / "state"
    broken = Array(whole.copy())
    broken.__class__ = type(
        "Broken", (Array,), {"__getitem__": lambda self, at: self.array[at] if at[0].start < 2 else 1 / 0}
    )
    sink = np.full_like(whole, np.nan)
    with pytest.raises(ZeroDivisionError) as error:
        ta.attend_blockwise(layer, broken, sink, chunks={"t": 1}, state=state)
    assert error.value.__notes__ == ["The sink is incomplete: 0 of 4 chunks are written."]
    source = Array(whole)
    ta.attend_blockwise(layer, source, sink, chunks={"t": 1}, state=state)
    assert source.read == [0, 1, 2, 3, 0, 1, 2, 3]
    np.testing.assert_allclose(sink, of_whole(layer, whole), rtol=1e-11, atol=1e-12)


def test_a_state_of_another_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(blockwise, "SECONDS", 0)
    layer, source, state = make("additive"), draw(*SIZES, 12).numpy(), tmp_path / "state"
    with pytest.raises(OSError, match="no space"):
        ta.attend_blockwise(layer, source, Array(source.copy(), lives=1), chunks={"t": 1}, state=state)
    calls = {
        "chunks": {"chunks": {"t": 2}},
        "mask": {"mask": np.ones(SIZES, bool)},
        "channel_mode": {"channel_mode": 3},
    }
    for name, call in calls.items():
        with pytest.raises(ta.OptionError) as error:
            ta.attend_blockwise(layer, source, np.zeros_like(source), state=state, **{"chunks": {"t": 1}, **call})
        rule = f"attend_blockwise: state {str(state)!r} is that of a run with another {name}."
        assert str(error.value) == f"{rule}\n  Delete it to start anew."
    other = make("additive", position_bias=ta.AlibiBias(2, modes="t h w", spacing=5.0))
    other.load_state_dict(layer.state_dict())  # a bias without weights
    with pytest.raises(ta.OptionError, match="another layer"):
        ta.attend_blockwise(other, source, np.zeros_like(source), chunks={"t": 1}, state=state)
    with torch.no_grad():
        layer.q_proj.bias += 1
    with pytest.raises(ta.OptionError, match="another layer"):
        ta.attend_blockwise(layer, source, np.zeros_like(source), chunks={"t": 1}, state=state)


def stopped(tmp_path, sink, **call):
    """Stop a run after two chunks of four are written; return the layer, the source and what to call again with."""
    layer, source = make("additive"), draw(*SIZES, 12).numpy()
    call = {"chunks": {"t": 1}, "state": tmp_path / "state", **call}
    with pytest.raises(OSError, match="no space"):
        ta.attend_blockwise(layer, source, sink, **call)
    return layer, source, call


def refusal(layer, source, sink, **call):
    """The message of what is refused."""
    with pytest.raises(ta.TensorAttentionError) as error:
        ta.attend_blockwise(layer, source, sink, **call)
    return str(error.value)


def test_a_state_knows_source_mask_and_sink_again(tmp_path, monkeypatch):
    monkeypatch.setattr(blockwise, "SECONDS", 0)
    mask = np.ones(SIZES, bool)
    sink = Array(np.full((*SIZES, 12), np.nan), lives=2)
    layer, source, call = stopped(tmp_path, sink, mask=mask)
    rule = f"attend_blockwise: state {str(tmp_path / 'state')!r} is that of a run with another"
    sink.lives, hint, other = 9, "\n  Delete it to start anew.", source.copy()
    other[1, 2, 3, 4] += 1
    assert refusal(layer, other, sink, **call) == f"{rule} source.{hint}"
    other = mask.copy()
    other[3, 4, 5] = False
    assert refusal(layer, source, sink, **{**call, "mask": other}) == f"{rule} mask.{hint}"
    fresh = Array(np.zeros_like(source))
    fresh.attrs["incomplete"] = True
    assert refusal(layer, source, fresh, **call) == f"{rule} sink.{hint}"
    assert refusal(layer, source, Array(sink.array), **call) == f"{rule} sink.{hint}"  # it has no mark
    ta.attend_blockwise(layer, source, sink, **call)
    np.testing.assert_allclose(sink.array, of_whole(layer, source), rtol=1e-11, atol=1e-12)


def test_a_sink_that_was_made_anew_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(blockwise, "SECONDS", 0)
    opened = lambda: np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float64, (*SIZES, 12))  # noqa: E731
    written = []
    write = blockwise._Files.write

    def fails(self, box, y):
        if len(written) == 2:
            raise OSError("no space left on device")
        written.append(box)
        write(self, box, y)

    monkeypatch.setattr(blockwise._Files, "write", fails)
    layer, source, call = stopped(tmp_path, opened())
    monkeypatch.setattr(blockwise._Files, "write", write)
    rule = f"attend_blockwise: state {str(tmp_path / 'state')!r} is that of a run with another sink."
    assert refusal(layer, source, opened(), **call) == f"{rule}\n  Delete it to start anew."
    call["state"].unlink()
    ta.attend_blockwise(layer, source, opened(), **call)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), of_whole(layer, source), rtol=1e-11, atol=1e-12)


def test_what_is_no_state_is_refused_before_any_work(tmp_path):
    layer, source = make("additive"), Array(draw(*SIZES, 12).numpy())
    sink = np.full((*SIZES, 12), np.nan)
    torch.save({"weights": torch.ones(2)}, tmp_path / "model.pt")
    (tmp_path / "text").write_text("words")
    (tmp_path / "empty").touch()
    for path, rule in {
        tmp_path / "none" / "state": "is in a folder that does not exist.",
        tmp_path: "is no file.",
        tmp_path / "model.pt": "is a file, but no state of attend_blockwise.",
        tmp_path / "text": "is a file, but no state of attend_blockwise.",
        tmp_path / "empty": "is a file, but no state of attend_blockwise.",
    }.items():
        assert refusal(layer, source, sink, state=path) == f"attend_blockwise: state {str(path)!r} {rule}"
    assert refusal(layer, source, sink, state=3) == "attend_blockwise: state must be a path, got int."
    assert source.read == [] and np.isnan(sink).all()


SAME = "attend_blockwise: sink is the source, which is read after parts of the output are written."


def test_arrays_of_files_that_are_refused(tmp_path):
    h5py, zarr = pytest.importorskip("h5py"), pytest.importorskip("zarr")
    layer, numbers = make("additive"), draw(*SIZES, 12).numpy()
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"], file["y"] = numbers, numbers
        assert refusal(layer, file["x"], file["x"]) == SAME
        np.testing.assert_array_equal(file["x"], numbers)
        ta.attend_blockwise(layer, file["x"], file["y"])
        np.testing.assert_allclose(file["y"], of_whole(layer, numbers), rtol=1e-11, atol=1e-12)
    cannot = "attend_blockwise: sink cannot be written to:"
    with h5py.File(tmp_path / "x.h5", "r") as file:
        rule = "Unable to synchronously create attribute (no write intent on file)."
        assert refusal(layer, numbers, file["y"]) == f"{cannot} {rule}"
    zarr.save_array(tmp_path / "x.zarr", numbers)
    assert refusal(layer, *(zarr.open_array(tmp_path / "x.zarr", mode="r+") for _ in range(2))) == SAME
    rule = "store was opened in read-only mode and does not support writing."
    assert refusal(layer, numbers, zarr.open_array(tmp_path / "x.zarr", mode="r")) == f"{cannot} {rule}"
    np.save(tmp_path / "x.npy", numbers)
    os.link(tmp_path / "x.npy", tmp_path / "link.npy")
    source, sink = np.load(tmp_path / "x.npy", mmap_mode="r"), np.load(tmp_path / "link.npy", mmap_mode="r+")
    assert refusal(layer, source, sink) == SAME
    assert refusal(layer, np.asarray(source)[::-1], np.asarray(sink)) == SAME


def test_a_file_is_marked_until_it_is_complete(tmp_path):
    layer, source = make("additive"), draw(*SIZES, 12).numpy()
    sink = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float64, (*SIZES, 12))
    mark = tmp_path / "y.npy.incomplete"
    broken = Array(source)
    broken.__class__ = type("Broken", (Array,), {"__getitem__": lambda self, at: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        ta.attend_blockwise(layer, broken, sink)
    assert mark.exists()
    ta.attend_blockwise(layer, source, sink)
    assert not mark.exists()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), of_whole(layer, source), rtol=1e-11, atol=1e-12)


def errors():
    """Calls that are refused: what is changed, and the message."""
    source, sink = np.zeros((*SIZES, 12)), np.ones((*SIZES, 12))
    parts = "attend_blockwise has no meaning for operator"
    once = "it needs all positions at once."
    need = "every mode needs at least 1 index."
    cells = "Take cells='blocks', or find cells once and hold them: layer.hold_cells(layer.find_cells(sample))."
    return {
        "no layer": ({"layer": torch.nn.Linear(2, 2)}, "layer must be a TensorAttention, got Linear."),
        "dropping": (
            {"layer": make("additive", dropout=0.5)},
            "layer is in training mode and drops.\n  Call layer.eval().",
        ),
        "kdim": ({"layer": make("additive", kdim=5)}, "layer takes a context: kdim is 5 and vdim 12, not 12."),
        "flattened": ({"layer": make("flattened")}, f"{parts} 'flattened': {once}"),
        "axial": ({"layer": make("axial")}, f"{parts} 'axial': {once}"),
        "kronecker": ({"layer": make("kronecker_sum")}, f"{parts} 'kronecker_sum': {once}"),
        "all modes": ({"layer": make("truncated", interaction_order=3)}, f"{parts} 'truncated': {once}"),
        "all other modes": (
            {"layer": make("truncated", kept=[("t", "h")], causal="w")},
            f"{parts} 'truncated': {once}",
        ),
        "search": (
            {"layer": make("clustered")},
            f"{parts} 'clustered': its search needs the keys of all positions at once.\n  {cells}",
        ),
        "control": (
            {"layer": make("clustered", cells="blocks", additive_control=True)},
            f"{parts} 'clustered': additive_control needs the cells of all positions at once.",
        ),
        "source": ({"source": [1.0]}, "source has no shape, got list."),
        "sink": ({"sink": range(3)}, "sink has no shape, got range."),
        "dimensions": ({"source": source[0]}, "source has 3 dimensions, but 3 modes and channels need 4."),
        "no channels": ({"channel_mode": None}, "source has 4 dimensions, but 3 modes need 3."),
        "channels": ({"channel_mode": 1}, "source has 5 channels, but embed_dim is 12."),
        "empty": ({"source": source[:, :0]}, f"mode 'h' has size 0 in source, but {need}"),
        "channel_mode": ({"channel_mode": 4}, "channel_mode must be an integer from -4 to 3 or None, got 4."),
        "sink shape": ({"sink": sink[1:]}, "sink has shape (3, 5, 6, 12), but source has (4, 5, 6, 12)."),
        "sink type": ({"sink": sink.astype(int)}, "sink must be floating point, got int64."),
        "same": (
            {"sink": source, "source": source},
            "sink is the source, which is read after parts of the output are written.",
        ),
        "overlap": (
            {"sink": source[::-1], "source": source},
            "sink is the source, which is read after parts of the output are written.",
        ),
        "masked": (
            {"source": np.ma.masked_equal(source, 0)},
            "source has masked values.\n  Give its data, and mask=, True where it is not masked.",
        ),
        "read-only": ({"sink": np.broadcast_to(np.float32(0), source.shape)}, "sink is read-only."),
        "words": ({"source": source.astype("U3")}, "source must hold real numbers, got <U3."),
        "complex": ({"source": source + 1j}, "source must hold real numbers, got complex128."),
        "complex tensor": ({"source": torch.ones(2) + 1j}, "source must hold real numbers, got torch.complex64."),
        "tensor": ({"sink": torch.ones(2)}, "sink must take NumPy arrays, got Tensor.\n  Give its .numpy()."),
        "mask": ({"mask": True}, "mask must be an array, got bool."),
        "mask shape": (
            {"mask": np.ones((4, 5), bool)},
            "mask has shape (4, 5), but the modes have the sizes (4, 5, 6).",
        ),
        "mask type": (
            {"mask": np.ones(SIZES)},
            "mask must be bool, True where a position takes part, but has the type float64.",
        ),
        "chunk": ({"chunks": {"h": 0}}, "chunks of mode 'h' must be at least 1, got 0."),
        "half": ({"chunks": 2.5}, "chunks of mode 't' must be an integer, got 2.5."),
        "mode": ({"chunks": {"z": 1}}, "there is no mode 'z' among 't h w' (order 3)."),
        "too few": ({"chunks": (1, 2)}, "chunks has 2 entries, but order 3 needs one a mode."),
        "frames": (
            {"layer": make("additive causal"), "chunks": {"w": 4}},
            "chunks cuts mode 'w' into 4 of 6, but it is causal.\n  Leave it whole and cut others, or feed an AttentionStream.",
        ),
        "progress": ({"progress": "yes"}, "progress must be True or False, got 'yes'."),
    }


@pytest.mark.parametrize("case", errors())
def test_errors(case):
    changed, message = errors()[case]
    call = {"layer": make("additive"), "source": np.zeros((*SIZES, 12)), "sink": np.ones((*SIZES, 12)), **changed}
    with pytest.raises(ta.TensorAttentionError) as error:
        ta.attend_blockwise(call.pop("layer"), call.pop("source"), call.pop("sink"), **call)
    assert str(error.value) == f"attend_blockwise: {message}"


KILLED = """
import os, signal, sys, numpy as np, torch, tensorattn as ta
from tensorattn import blockwise
torch.manual_seed(0)
blockwise.SECONDS = 0
layer = ta.TensorAttention(8, 2, modes="t h")
source = np.random.default_rng(0).standard_normal((6, 5, 8)).astype(np.float32)
sink = np.lib.format.open_memmap(sys.argv[1], "r+" if os.path.exists(sys.argv[1]) else "w+", np.float32, source.shape)
write = blockwise._Files.write
def killed(self, box, y):
    write(self, box, y)
    if box[0][0] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
blockwise._Files.write = killed
ta.attend_blockwise(layer, source, sink, chunks={"t": 1}, state=sys.argv[2])
with torch.no_grad():
    print(float(abs(np.load(sys.argv[1]) - layer(torch.tensor(source)[None])[0].numpy()).max()))
"""


@pytest.mark.thorough
def test_what_was_killed_is_told_and_goes_on(tmp_path):
    def run(at):
        files = [str(tmp_path / "y.npy"), str(tmp_path / "state")]
        return subprocess.run([sys.executable, "-c", KILLED, *files, str(at)], capture_output=True, text=True)

    assert run(3).returncode == -9
    assert {path.name for path in tmp_path.iterdir()} == {"y.npy", "y.npy.incomplete", "state"}
    last = run(-1)
    assert last.returncode == 0 and float(last.stdout) < 1e-6, last.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"y.npy"}


KILLED_HDF5 = """
import os, signal, sys, h5py, numpy as np, torch, tensorattn as ta
from tensorattn import blockwise
write = blockwise._Files.write
def killed(self, box, y):
    write(self, box, y)
    if box[0][0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
blockwise._Files.write = killed
file = h5py.File(sys.argv[1], "r+")
source = np.random.default_rng(0).standard_normal((6, 4000, 8)).astype(np.float32)
ta.attend_blockwise(ta.TensorAttention(8, 2, modes="t h"), source, file["y"], chunks={"t": 1})
"""


@pytest.mark.thorough
def test_what_was_killed_is_told_in_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file["y"] = np.zeros((6, 4000, 8), np.float32)  # contiguous, and longer than what is held back
    run = subprocess.run([sys.executable, "-c", KILLED_HDF5, str(tmp_path / "y.h5")], capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    with h5py.File(tmp_path / "y.h5", "r") as file:
        assert file["y"][0].any() and dict(file["y"].attrs) == {"incomplete": True}


LIMITED = """
import resource, sys, time, numpy as np, torch, tensorattn as ta
torch.set_num_threads(1)
source = np.load(sys.argv[1], mmap_mode="r")
sink = np.load(sys.argv[2], mmap_mode="r+")
layer = ta.TensorAttention(128, 2, modes="t x y z")
ta.attend_blockwise(layer, source[:1, :2], np.zeros_like(source[:1, :2]))  # what is loaded at first
def private():
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(("VmData",))) << 10
before = private()
resource.setrlimit(resource.RLIMIT_DATA, (before + (300 << 20),) * 2)
start = time.perf_counter()
for frame in source:
    float(np.sum(frame, dtype=np.float32))
read = time.perf_counter() - start
try:
    np.array(source)
except MemoryError:
    print("the whole does not fit")
start = time.perf_counter()
ta.attend_blockwise(layer, source, sink, chunks={"t": 1, "x": 8})
print(f"plain read {read:.1f} s, blockwise {time.perf_counter() - start:.1f} s")
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
def test_a_file_larger_than_memory(tmp_path):
    if shutil.disk_usage(tmp_path).free < 6 << 30:
        pytest.skip("the disk has too little space")
    shape = (32, 32, 64, 64, 128)  # 2.1 GB
    files = [tmp_path / name for name in ("x.npy", "y.npy")]
    source, _ = (np.lib.format.open_memmap(file, "w+", np.float32, shape) for file in files)
    for at, frame in enumerate(source):
        frame[:] = np.random.default_rng(at).standard_normal(shape[1:], dtype=np.float32)
    run = subprocess.run([sys.executable, "-c", LIMITED, *map(str, files)], capture_output=True, text=True, timeout=250)
    assert run.returncode == 0 and run.stdout.startswith("the whole does not fit\n"), run.stderr
    print(run.stdout)
    assert not Path(f"{files[1]}.incomplete").exists()
    assert np.isfinite(np.load(files[1], mmap_mode="r")[-1, -1]).all()
