"""The house: imports point down through its rooms, and what is optional stays optional.

Everything is read from the source. The checker is itself checked on sources that break one rule each.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import tensorattn

PACKAGE = Path(tensorattn.__file__).parent
PROJECT = PACKAGE.parent / "pyproject.toml"

LIBRARY = (  # each imports those before it
    *("errors", "modes", "masks", "averages", "functional", "processes", "sharding", "nn", "models", "blockwise"),
)
DOORS = "integrations"  # a room of the library that measures what it does, so it lies behind diagnose
TOOLS = ("testing", "cli", "__main__")
ROOMS = (*LIBRARY, "diagnose", DOORS, *TOOLS)
APART = "testing.reference"  # the oracle, which shares nothing with the rest
OPTIONAL = (
    *("matplotlib", "hypothesis", "nibabel", "pydicom", "PIL", "av", "tqdm", "scipy", "peft", "safetensors"),
    *("tifffile", "imagecodecs", "h5py", "zarr", "timm", "transformers", "monai", "diffusers"),
)
LATE = ("cli.main", "cli.common")  # the commands, and packages that may not be installed, are imported when needed


def read_package() -> dict[str, str]:
    """Source of every module, by its dotted name below the package; the package itself is the empty name."""
    sources = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return sources


@functools.cache
def requirements() -> set[str]:
    """Distributions that the package requires; each is imported under its own name."""
    required = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    return set(re.findall(r"^[\w-]+", "\n".join(required), flags=re.MULTILINE))


@functools.cache
def parsed(source: str) -> list[ast.AST]:
    """All nodes of a source, outer ones first."""
    return list(ast.walk(ast.parse(source)))


def imports(module: str, source: str, sources: dict[str, str]) -> Iterator[tuple[str, bool]]:
    """Names of the modules that a module imports, and whether inside a function."""
    functions = [node for node in parsed(source) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inner = {id(node) for function in functions for node in ast.walk(function)}
    for node in parsed(source):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inner
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["tensorattn", *filter(None, module.split("."))]
                is_package = not module or any(name.startswith(f"{module}.") for name in sources)
                base = ".".join([*package[: len(package) - node.level + is_package], *filter(None, [base])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole.removeprefix("tensorattn.") in sources else base, id(node) in inner


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A cycle of modules that import each other, or an empty list."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for neighbour in sorted(graph.get(node, ())):
            if found := walk(neighbour, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def broken_imports(module: str, source: str, sources: dict[str, str]) -> Iterator[str]:
    """Every import of a module that breaks a rule, in words."""
    room, allowed = module.split(".")[0], set(sys.stdlib_module_names) | requirements()
    for name, inside in imports(module, source, sources):
        top, target = name.split(".")[0], name.removeprefix("tensorattn").removeprefix(".")
        below = target.split(".")[0]
        if inside and not (room == "cli" and (top in OPTIONAL or below == "testing")):
            yield f"{module} imports {name} inside a function"
        elif top != "tensorattn":
            if top not in allowed and not inside and (room, top) != ("testing", "hypothesis"):
                yield f"{module} imports {name}, which is not required: go through cli.common.require"
        elif module == APART:
            yield f"{module} stands apart, but imports {name}"
        elif not below:
            if room in (*LIBRARY, "diagnose", DOORS):
                yield f"{module} imports the package itself, which imports everything"
        elif below == "testing" and room not in ("testing", "cli"):
            yield f"{module or 'the package'} imports {name}, which only the command line may"
        elif below not in ROOMS:
            yield f"{module} imports {name}, which is in no room"
        elif room and ROOMS.index(below) > ROOMS.index(room):
            yield f"{module} imports {name}, which is above {room}"


def broken_statements(module: str, source: str) -> Iterator[str]:
    """Every statement of a module that breaks a rule, in words."""
    library = module.split(".")[0] in (*LIBRARY, DOORS)
    for node in parsed(source):
        if isinstance(node, ast.Call):
            named = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if named in ("import_module", "__import__") and module not in LATE:
                yield f"{module} calls {named}, which only {' and '.join(LATE)} may"
            if library and named == "isinstance" and any(isinstance(part, ast.BinOp) for part in node.args):
                yield f"{module} asks isinstance for A | B, which torch.compile of older versions cannot trace"
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.BitOr) and library:
            yield f"{module} has |=, which torch.compile of older versions cannot trace"
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq) and library:
            named = getattr(node.left, "attr", getattr(node.left, "id", ""))
            number = getattr(node.comparators[0], "value", 0)
            if named == "order" and isinstance(number, int) and number > 1:
                yield f"{module} has code for order {number} alone"


def problems(sources: dict[str, str]) -> list[str]:
    """Every broken rule of the house, in words."""
    broken, graph = [], {}
    for module, source in sources.items():
        if module and module.split(".")[0] not in ROOMS:
            broken.append(f"{module} is in no room: give it a place in this test")
            continue
        broken += [*broken_imports(module, source, sources), *broken_statements(module, source)]
        named = {name for name, _ in imports(module, source, sources)}
        graph[module] = {name.removeprefix("tensorattn").removeprefix(".") for name in named if "tensorattn" in name}
    if path := cycle(graph):
        broken.append(f"modules import each other: {' -> '.join(name or 'tensorattn' for name in path)}")
    return broken


def test_imports_point_down():
    assert problems(read_package()) == []


def test_every_room_is_read():
    assert {name.split(".")[0] for name in read_package()} == {"", *ROOMS}
    assert {APART, *LATE, "functional.additive", "nn.attention"} <= set(read_package())


BROKEN = {
    "up": (
        {"modes": "from tensorattn.functional.summary import Summary", "functional.summary": ""},
        "modes imports tensorattn.functional.summary, which is above modes",
    ),
    "up by the module": (
        {"averages.means": "from tensorattn import functional", "functional": ""},
        "averages.means imports tensorattn.functional, which is above averages",
    ),
    "up by a relative import": (
        {"functional": "", "functional.kao": "from ..nn import TensorAttention", "nn": ""},
        "functional.kao imports tensorattn.nn, which is above functional",
    ),
    "up under another name": (
        {"masks": "import tensorattn.nn.attention as attention", "nn.attention": ""},
        "masks imports tensorattn.nn.attention, which is above masks",
    ),
    "a host is imported": (
        {"integrations.timm": "import timm"},
        "integrations.timm imports timm, which is not required: go through cli.common.require",
    ),
    "a door under what it measures with": (
        {"diagnose.error": "from tensorattn.integrations import swap_attention", "integrations": ""},
        "diagnose.error imports tensorattn.integrations, which is above diagnose",
    ),
    "a tool under the library": (
        {"nn.attention": "from tensorattn.diagnose import cost", "diagnose": ""},
        "nn.attention imports tensorattn.diagnose, which is above nn",
    ),
    "the package itself": (
        {"diagnose": "import tensorattn as ta", "": ""},
        "diagnose imports the package itself, which imports everything",
    ),
    "the oracle leans on the package": (
        {"testing.reference": "from tensorattn.modes import ModeSpec", "modes": ""},
        "testing.reference stands apart, but imports tensorattn.modes",
    ),
    "the package leans on the oracle": (
        {"diagnose.error": "from tensorattn.testing.reference import outer_sum", "testing.reference": ""},
        "diagnose.error imports tensorattn.testing.reference, which only the command line may",
    ),
    "inside a function": (
        {"masks": "def f():\n    from tensorattn.modes import ModeSpec", "modes": ""},
        "masks imports tensorattn.modes inside a function",
    ),
    "inside a method, under a condition": (
        {"cli.attend": "class A:\n    def f(self):\n        if self:\n            import math"},
        "cli.attend imports math inside a function",
    ),
    "an optional package": (
        {"cli.figures": "import matplotlib.pyplot as plt"},
        "cli.figures imports matplotlib.pyplot, which is not required: go through cli.common.require",
    ),
    "hypothesis outside testing": (
        {"diagnose": "from hypothesis import given"},
        "diagnose imports hypothesis, which is not required: go through cli.common.require",
    ),
    "a hidden import": (
        {"cli.figures": "import importlib\nplt = importlib.import_module('matplotlib')"},
        "cli.figures calls import_module, which only cli.main and cli.common may",
    ),
    "a module that has moved": (
        {"cli.verify": "from tensorattn.progress import progress"},
        "cli.verify imports tensorattn.progress, which is in no room",
    ),
    "no room": ({"transport": "import math"}, "transport is in no room: give it a place in this test"),
    "a cycle in one room": (
        {"nn.a": "from tensorattn.nn.b import f", "nn.b": "from tensorattn.nn import a", "nn": ""},
        "modules import each other: nn.a -> nn.b -> nn.a",
    ),
    "isinstance of a union": (
        {"modes": "isinstance(1, int | str)"},
        "modes asks isinstance for A | B, which torch.compile of older versions cannot trace",
    ),
    "a dictionary is extended in place": (
        {"nn.attention": "settings = {}\nsettings |= {1: 2}"},
        "nn.attention has |=, which torch.compile of older versions cannot trace",
    ),
    "code for one order": ({"functional": "if grid.order == 3:\n    pass"}, "functional has code for order 3 alone"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_checker_finds(case):
    sources, problem = BROKEN[case]
    assert problems(sources) == [problem]


def test_the_checker_lets_pass():
    right = {
        "": "from tensorattn.cli.figures import draw_attention_maps\nfrom tensorattn.diagnose import cost",
        "modes": "import math, numpy, torch, opt_einsum",
        "functional": "",
        "functional.operator": "from .. import modes\nfrom ..modes import ModeSpec\nif order == 1:\n    pass",
        "functional.additive": "from tensorattn.functional.operator import run\nisinstance(1, (int, str))",
        "diagnose": "from tensorattn.functional import additive",
        "testing": "",
        "testing.reference": "import math\nimport torch",
        "testing.laws": "import hypothesis\nimport tensorattn\nfrom tensorattn.testing import reference",
        "cli.figures": "seen = 1\nseen |= 2",
        "cli.common": "import importlib\nimportlib.import_module('matplotlib')",
        "cli.verify": "def run():\n    from tensorattn.testing import laws\n    import tqdm",
    }
    assert problems(right) == []


PROBE = """
import json, sys, torch, numpy, opt_einsum
before = set(sys.modules)
for statements in {stages!r}:
    exec(statements)
    new = {{name.split(".")[0] for name in set(sys.modules) - before}}
    print(json.dumps(sorted(new & set({optional!r}))))
"""


def imported(*stages: str) -> list[list[str]]:
    """Optional packages that a fresh interpreter has imported after each stage, over what the requirements import."""
    code = PROBE.format(stages=stages, optional=OPTIONAL)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()[-len(stages) :]]


def reached(module: str, sources: dict[str, str]) -> set[str]:
    """Modules of the package that are imported with a module, itself included."""
    found, todo = set(), [module]
    while todo:
        found.add(name := todo.pop())
        named = {
            whole.removeprefix("tensorattn.") for whole, inner in imports(name, sources[name], sources) if not inner
        }
        todo += (named & set(sources)) - found
    return found


def test_importing_imports_nothing_optional():
    sources = read_package()
    others = [
        name
        for name in sources
        if name not in ("", "__main__") and not any(each.startswith("testing") for each in reached(name, sources))
    ]
    assert "cli.bench" not in others and "cli.attend" in others
    package, modules, control = imported(
        "import tensorattn", "\n".join(f"import tensorattn.{name}" for name in others), "import hypothesis.strategies"
    )
    assert (package, modules) == ([], [])
    assert len(others) > 30 and "hypothesis" in control  # the probe does see what is imported
