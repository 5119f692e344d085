"""The page: whole in itself, well formed, with the numbers of the report in it, and pictures that are pictures."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tensorattn.cli.attend import Report, examine, prepare
from tensorattn.cli.common import parse_choices
from tensorattn.cli.page import page
from tensorattn.cli.recordings import FileArray, make_recording, parse_modes

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
VOID = {"meta", "img", "input", "br", "line", "rect"}


class Parts(HTMLParser):
    """Tags that were not closed, addresses that are referred to, cells, and the text of scripts by their class."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.cells: list[str] = []
        self.data: dict[str, object] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.script = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        self.script = given.get("class") or "" if tag == "script" else self.script
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)
        if self.open and self.open[-1] == "script" and self.script:
            self.data[self.script] = json.loads(data)


def picture(address: str) -> Image.Image:
    kind, _, data = address.partition(";base64,")
    assert kind == "data:image/png"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def report(*shape: int, modes: str, name: str = "a") -> Report:
    array = np.random.default_rng(0).integers(0, 200, shape).astype(np.uint8)
    recording = make_recording(FileArray(array), name=name, source="<a & b>", modes=parse_modes(modes))
    job = prepare(recording, parse_choices(["clustered", "additive"]), patch="2", dim=8, heads=2)
    return examine(job, lambda work: None)


def written(*reports: Report) -> str:
    dot = io.BytesIO()
    Image.new("L", (1, 1)).save(dot, format="PNG")
    figures = {f"{each.job.recording.name}-maps.png": dot.getvalue() for each in reports}
    return page([(each.view, each.heading, each.cells, each.footnotes) for each in reports], figures)


@pytest.mark.parametrize("modes", ["t", "h w", "t h w", "t x y z"])
def test_a_page_is_whole_in_itself(modes: str) -> None:
    order = len(modes.split())
    found = report(*(9, 8, 6, 5)[:order], modes=modes)
    text = written(found)
    parts = Parts(text)
    assert parts.open == [] and "<a & b>" not in text and "&lt;a &amp; b&gt;" in text
    assert "http" not in text and all(address.startswith("data:image/png;base64,") for address in parts.addresses)
    for address in parts.addresses:
        picture(address).verify()
    assert parts.cells == [cell for row in found.cells for cell in row]
    sliders = [given for tag, given in parts.tags if tag == "input"]
    assert len(sliders) == (order > 2)
    assert sum(tag == "svg" for tag, _ in parts.tags) == order
    weights = parts.data["weights"]["weights"]
    assert list(weights) == ["full attention", "clustered", "additive"]
    for mode, name in enumerate(modes.split()):
        others = tuple(m + 1 for m in range(order) if m != mode)
        np.testing.assert_allclose(weights["full attention"][name], found.view.exact.sum(axis=others), rtol=1e-6)


def test_the_slider_steps_through_slices() -> None:
    found = report(9, 8, 12, 3, modes="t h w")
    parts = Parts(written(found))
    data = parts.data["slices"]
    (slider,) = (given for tag, given in parts.tags if tag == "input")
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "4", "2")
    assert data["mode"] == "t" and data["elements"] == [0, 2, 4, 6, 8] and data["chosen"] == 2
    assert [len(each) for each in data["images"]] == [5] * 4  # the recording and three maps
    first = np.asarray(picture(data["images"][0][3]))
    np.testing.assert_array_equal(first, found.job.recording.array[6])
    exact = found.view.maps["full attention"][3].repeat(2, 0).repeat(2, 1)
    shown = np.asarray(picture(data["images"][1][3]).convert("RGB"))
    darkest = np.unravel_index(exact.argmax(), exact.shape)
    assert shown.shape == (8, 12, 3) and (shown == shown[darkest]).all(-1)[exact == exact.max()].all()
    reds, ratios = shown[..., 0].astype(int) - shown[..., 2], exact * found.view.maps["full attention"].size
    assert (reds[ratios > 1.2] > 0).all() and (reds[ratios < 1 / 1.2] < 0).all() and (ratios > 1.2).any()


def test_words_are_no_tags() -> None:
    found = report(6, 7, modes="h w")
    text = page([(found.view, ["<i>"], [["<b>"], ["<b>"]], ["<u>"])], {})
    assert not {"<i>", "<b>", "<u>"} & {text[at : at + 3] for at in range(len(text))}
    assert Parts(text).cells == ["<b>", "<b>"]


def test_two_recordings_have_a_section_each() -> None:
    text = written(report(6, 7, modes="h w"), report(6, 7, modes="h w", name="b"))
    assert text.count("<section>") == 2 and text.count('alt="b-maps.png"') == 1 and text.count('alt="a-maps.png"') == 1


# ---- in a browser ------------------------------------------------------------------------------------------------


def browse(path: Path, *words: str) -> str:
    """Open a page without a window, and return what is printed."""
    assert BROWSER is not None
    quiet = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        f"--user-data-dir={path.parent}",
    )
    done = subprocess.run([BROWSER, *quiet, *words, path.as_uri()], capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


@pytest.mark.thorough
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_slider_moves_slices_in_a_browser(tmp_path: Path) -> None:
    move = """<script>
    const slider = document.querySelector("input"); slider.value = 1; slider.dispatchEvent(new Event("input"));
    </script></body>"""
    text = written(report(9, 8, 12, 3, modes="t h w"))
    (tmp_path / "a.html").write_text(text.replace("</body>", move))
    slices = Parts(text).data["slices"]["images"]
    moved = browse(tmp_path / "a.html", "--dump-dom")
    shown = re.findall(r'<div class="slice"><img[^>]* src="([^"]+)"', moved)
    assert shown == [of[1] for of in slices] and slices[0][1] != slices[0][2]
    assert "<output>t = 2</output>" in moved
    assert moved.count('<div class="cross"') == moved.count(' hidden=""') == 4  # the query is in another slice
    browse(tmp_path / "a.html", "--window-size=1000,2000", f"--screenshot={tmp_path / 'a.png'}")
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    coloured = np.abs(pixels[..., 0] - pixels[..., 2]) > 60
    assert coloured.mean() > 0.01 and (pixels.sum(-1) > 700).mean() > 0.3  # maps and charts on a light page
