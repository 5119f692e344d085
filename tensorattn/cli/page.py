"""One page that needs nothing else: the table, the figures, the weights along the modes, and a slider over slices."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tensorattn.cli.common import require
from tensorattn.cli.figures import COLOURS, Array, Slices, slices, times_uniform, weights_label
from tensorattn.cli.view import FULL, View

__all__ = ["page"]

MOST_SLICES = 48
PIXELS = 320  # of a side of a slice
CHART = (300, 150)  # pixels of a chart of weights, without its margin
MARGIN = 34

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem; }
figure { margin: 0; max-width: 22rem; }
.slice { position: relative; }
.slice img { width: 100%; image-rendering: pixelated; display: block; }
.cross { position: absolute; width: 0; height: 0; }
.cross::before { content: "+"; position: absolute; translate: -50% -50%; font: 700 1.6rem/1 monospace; color: #000;
  text-shadow: 0 0 3px #fff, 0 0 3px #fff, 0 0 3px #fff; }
.bar { height: .8rem; width: 22rem; max-width: 100%; }
.ends { display: flex; justify-content: space-between; width: 22rem; max-width: 100%; font-size: .85rem; }
input[type=range] { width: 22rem; max-width: 100%; }
.drawn { max-width: 100%; background: #fff; }
svg { background: #fff; color: #000; }
.key { display: inline-block; width: 1.2rem; height: .25rem; vertical-align: middle; margin: 0 .3rem 0 1rem; }
footer, .notes { font-size: .9rem; }
"""

SCRIPT = """
for (const part of document.querySelectorAll("section")) {
  const data = JSON.parse(part.querySelector("script.slices")?.textContent ?? "null");
  const slider = part.querySelector("input");
  if (!data || !slider) continue;
  const move = () => {
    const at = Number(slider.value);
    part.querySelectorAll(".slice img").forEach((image, n) => { image.src = data.images[n][at]; });
    part.querySelectorAll(".cross").forEach(cross => { cross.hidden = at !== data.chosen; });
    part.querySelector("output").textContent = data.mode + " = " + data.elements[at];
    const line = part.querySelector("line.moving");
    if (line) for (const end of ["x1", "x2"]) line.setAttribute(end, data.lines[at]);
  };
  slider.addEventListener("input", move);
  move();
}
"""

Section = tuple[View, Sequence[str], Sequence[Sequence[str]], Sequence[str]]


def page(sections: Sequence[Section], figures: Mapping[str, bytes]) -> str:
    """Write the page.

    Args:
        sections: For each recording what one query attends to, the lines above the table, the table in words with its
            headings first, and the lines below it.
        figures: Pictures by file name; each section shows those that begin with the name of its recording.

    Returns:
        The page, HTML in UTF-8, with every picture inside.
    """
    parts = "\n".join(_section(*section, figures) for section in sections)
    title = "What attention operators do: " + ", ".join(view.recording.name for view, *_ in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n{parts}\n<script>{SCRIPT}</script></body></html>\n"
    )


def _section(
    view: View,
    heading: Sequence[str],
    table: Sequence[Sequence[str]],
    notes: Sequence[str],
    figures: Mapping[str, bytes],
) -> str:
    """Write what was found on one recording."""
    own = {name: data for name, data in figures.items() if name.startswith(f"{view.recording.name}-")}
    first, *rest = heading
    cuts = None
    if len(view.place.sizes) > 1:
        cuts = slices(view.recording, view.place, view.maps, most=MOST_SLICES, pixels=PIXELS)
    pictures = "".join(
        f'<p><img class="drawn" alt="{html.escape(name)}" src="{_uri(data)}"></p>\n' for name, data in own.items()
    )
    return (
        f"<section><h2>{html.escape(first)}</h2>\n{_list(rest)}"
        f"<h3>Cost and error</h3>\n<div class=wide>{_table(table)}</div>\n{_list(notes)}"
        f"{_stepped(view, cuts) if cuts else ''}{_weights(view, cuts.mode if cuts else None)}"
        f"<h3>Figures</h3>\n{pictures}</section>"
    )


def _list(lines: Sequence[str]) -> str:
    """Write lines, one under the other."""
    return f'<p class="notes">{"<br>".join(html.escape(line.strip()) for line in lines)}</p>\n' if lines else ""


def _table(cells: Sequence[Sequence[str]]) -> str:
    """Write the table."""
    head, *rows = cells
    names = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


# ---- the slider --------------------------------------------------------------------------------------------------


def _stepped(view: View, cuts: Slices) -> str:
    """Write slices of the recording and of the maps side by side, with a slider over them."""
    images = [[_picture(each) for each in cuts.images]]
    images += [[_picture(each, cuts.limit) for each in of] for of in cuts.maps.values()]
    across, down = (f"{100 * share:.2f}%" for share in cuts.cross)
    shown = "".join(
        f'<figure><div class="slice"><img alt="{html.escape(name)}" src="{of[cuts.chosen]}" '
        f'style="aspect-ratio: {cuts.width:.4f}"><div class="cross" style="left: {across}; top: {down}"></div></div>'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, of in zip(("the recording", *cuts.maps), images, strict=True)
    )
    name = "" if cuts.mode is None else view.place.names[cuts.mode]
    slider = f"<p>The cross marks {html.escape(view.place.words())}; {html.escape(view.which)}. "
    slider += "What is red gets more of its attention than the average position, what is blue less.</p>\n"
    if len(cuts.elements) > 1:
        slider += (
            f'<p><label>slice along {html.escape(name)} <input type="range" min="0" max="{len(cuts.elements) - 1}" '
            f'value="{cuts.chosen}"></label> <output>{html.escape(name)} = {cuts.elements[cuts.chosen]}</output></p>\n'
        )
    data = {
        "mode": name,
        "elements": cuts.elements,
        "chosen": cuts.chosen,
        "images": images,
        "lines": [_across(element, view.place.sizes[cuts.mode or 0]) for element in cuts.elements],
    }
    return (
        f"<h3>What one position attends to</h3>\n{slider}"
        f'<div class="panels">{shown}</div>\n{_scale(cuts)}'
        f'<script type="application/json" class="slices">{_json(data)}</script>\n'
    )


def _scale(cuts: Slices) -> str:
    """Write the scale of colours."""
    colours = _colours()[::17]
    stops = ", ".join(f"rgb({red}, {green}, {blue})" for red, green, blue in colours.tolist())
    most = f"{2**cuts.limit:.3g}"
    return (
        f'<div class="bar" style="background: linear-gradient(to right, {stops})"></div>'
        f'<div class="ends"><span>1/{most}</span><span>uniform attention</span><span>{most}×</span></div>\n'
    )


def _colours() -> Array:
    """Return the 256 colours of maps, as bytes."""
    colours = require("matplotlib", extra="examples", purpose="drawing figures").colormaps["RdBu_r"]
    found: Array = np.round(255 * colours(np.arange(256))[:, :3]).astype(np.uint8)
    return found


def _picture(values: Array, limit: float | None = None) -> str:
    """Return a picture as a data URI: grey or colours between 0 and 1 or bytes, or a map up to a limit in colours."""
    pillow = require("PIL.Image", extra="examples", purpose="writing pictures")
    if limit is not None:
        values = (values / limit + 1) / 2
    if values.dtype != np.uint8:
        values = np.round(255 * np.clip(values, 0, 1)).astype(np.uint8)
    picture, buffer = pillow.fromarray(np.ascontiguousarray(values)), io.BytesIO()
    if limit is not None:
        picture = picture.convert("P")
        picture.putpalette(_colours().tobytes())
    picture.save(buffer, format="PNG", optimize=True)
    return _uri(buffer.getvalue())


def _uri(data: bytes) -> str:
    """Return a PNG picture as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _json(data: Any) -> str:
    """Write data inside an element of a page."""
    return json.dumps(data).replace("<", "\\u003c")


# ---- weights along the modes -------------------------------------------------------------------------------------


def _weights(view: View, stepped: int | None) -> str:
    """Write the weights of the shown head along every mode as charts, and those of all heads as numbers."""
    place, order = view.place, len(view.place.sizes)
    marginal = [view.exact.sum(axis=tuple(m for m in range(1, order + 1) if m != mode + 1)) for mode in range(order)]
    lines = {FULL: marginal, **view.weights}
    styles = dict(zip(lines, ("#000000", *itertools.islice(itertools.cycle(COLOURS), len(view.weights))), strict=True))
    charts = "".join(
        _chart(
            view,
            mode,
            {name: times_uniform(of, mode)[view.head] for name, of in lines.items()},
            styles,
            mode == stepped,
        )
        for mode in range(order)
    )
    keys = "".join(
        f'<span class="key" style="background: {colour}"></span>{html.escape(weights_label(name, lines[name]))}'
        for name, colour in styles.items()
    )
    data = {
        "modes": place.names,
        "weights": {name: {at: of[m].tolist() for m, at in enumerate(place.names)} for name, of in lines.items()},
    }
    return (
        f"<h3>Weights along each mode</h3>\n<p>{html.escape(view.which)}; 1 is what each would get if all "
        "got the same; dotted: the query. Full attention is summed over the other modes.</p>\n"
        f'<p>{keys}</p>\n<div class="row">{charts}</div>\n'
        f'<script type="application/json" class="weights">{_json(data)}</script>\n'
    )


def _across(element: float, size: int) -> float:
    """Return where an element lies on a chart."""
    return round(MARGIN + (element + 0.5) / size * CHART[0], 1)


def _chart(view: View, mode: int, lines: Mapping[str, Array], styles: Mapping[str, str], moving: bool) -> str:
    """Draw the weights along one mode."""
    place, (width, height) = view.place, CHART
    size, centres = place.sizes[mode], place.centres(mode)
    most = 1.05 * max(1.0, *(float(each.max()) for each in lines.values()))

    def down(ratio: float) -> float:
        """Return where a weight lies."""
        return round(8 + height * (1 - ratio / most), 1)

    drawn = "".join(
        f'<polyline fill="none" stroke="{styles[name]}" stroke-width="{2.5 if name == FULL else 1.5}" points="'
        + " ".join(f"{_across(at, size)},{down(ratio)}" for at, ratio in zip(centres, each, strict=True))
        + f'"><title>{html.escape(name)}</title></polyline>'
        for name, each in lines.items()
    )
    query = _across(place.element[mode], size)
    upright = f'y1="8" y2="{8 + height}" x1="{query}" x2="{query}"'
    if moving:
        drawn += f'<line class="moving" {upright} stroke="#d55e00" stroke-opacity=".5" stroke-width="3"/>'
    label = html.escape(place.labels[mode])
    return (
        f'<svg role="img" aria-label="weights along {label}" width="{width + MARGIN + 10}" height="{height + 46}" '
        f'font-size="11" fill="currentColor">'
        f'<rect x="{MARGIN}" y="8" width="{width}" height="{height}" fill="none" stroke="#888"/>'
        f'<line x1="{MARGIN}" x2="{MARGIN + width}" y1="{down(1)}" y2="{down(1)}" stroke="#bbb"/>'
        f'<text x="{MARGIN - 4}" y="{down(1) + 4}" text-anchor="end">1</text>'
        f'<text x="{MARGIN - 4}" y="{down(most) + 8}" text-anchor="end">{most:.2g}</text>'
        f'<text x="{MARGIN - 4}" y="{down(0)}" text-anchor="end">0</text>'
        f"{drawn}"
        f'<line {upright} stroke="#000" stroke-dasharray="2 3"/>'
        f'<text x="{MARGIN}" y="{height + 22}">0</text>'
        f'<text x="{MARGIN + width}" y="{height + 22}" text-anchor="end">{size - 1}</text>'
        f'<text x="{MARGIN + width / 2}" y="{height + 38}" text-anchor="middle">{label}</text></svg>'
    )
