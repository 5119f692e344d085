"""The floors of the package: imports only point down, and what is optional stays optional.

Everything is read from the source. The checker is itself checked on sources that break one rule each.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tensorattn

ROOT = "tensorattn"
PACKAGE = Path(tensorattn.__file__).parent
PROJECT = PACKAGE.parent / "pyproject.toml"

FLOORS = {
    "errors": 0,
    "modes": 1,
    "slabs": 1,
    "absorbing": 1,
    "contraction_tree": 2,
    "planning": 2,
    "truncation": 2,
    "patching": 2,
    "cost": 2,
    "options": 3,
    "weights": 3,
    "weighing": 3,
    "presence": 3,
    "execution": 3,
    "handover": 3,
    "contraction": 3,
    "averages": 3,
    "fused": 3,
    "positionwise": 3,
    "tokens": 3,
    "softmax": 3,
    "summary": 4,
    "summarizing": 4,
    "running": 4,
    "causal": 4,
    "operators": 5,
    "nn": 6,
    "stats": 6,
    "streaming": 6,
    "distributed": 6,
    "models": 7,
    "diagnose": 7,
    "measuring": 7,
    "progress": 7,
    "testing": 7,
    "bench": 7,
    "attend": 7,
    "verify": 7,
    "__main__": 7,
}
APART = {"reference"}  # the oracle, which shares nothing with the rest
ROOF = max(FLOORS.values()) + 1  # the package itself, which re-exports
TORCH_FROM = 3
OWN_DEPENDENCY = {"hypothesis": "testing"}  # importable without being required, by one part alone
NEEDING = ("testing", "verify")  # parts that need Hypothesis, but for these modules, which the command line imports
NEEDING_NOT = ("verify", "verify.command")
LATE_IMPORTER = "attend.optional"  # the one place that imports what may not be installed
OPTIONAL = ("matplotlib", "hypothesis", "nibabel", "pydicom", "PIL", "av", "tqdm", "jax", "scipy")


def read_package() -> dict[str, str]:
    """Source of every module, by its dotted name below the package; the package itself is the empty name."""
    sources = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return sources


def requirements() -> set[str]:
    """Distributions that the package requires; each is imported under its own name."""
    required = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    return {re.match(r"[\w-]+", requirement).group() for requirement in required}


def imports(module: str, source: str, sources: dict[str, str]) -> list[tuple[str, bool]]:
    """Absolute names of the modules that a module imports, and whether inside a function."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = [ROOT, *module.split(".")] if module else [ROOT]
                is_package = any(name.startswith(f"{module}.") for name in sources) or not module
                package = package[: len(package) - (node.level - is_package)]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.append((whole if whole.removeprefix(f"{ROOT}.") in sources else base, inside))
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


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


def problems(sources: dict[str, str]) -> list[str]:
    """Every broken rule of the floors, in words."""
    allowed = set(sys.stdlib_module_names) | requirements()
    broken, graph = [], {}
    for module, source in sources.items():
        part = module.split(".")[0]
        if part and part not in FLOORS and part not in APART:
            broken.append(f"{module} is on no floor: give {part!r} its floor in the table FLOORS of this test")
            continue
        floor = FLOORS.get(part, ROOF)
        graph[module] = set()
        for name, inside in imports(module, source, sources):
            if inside:
                broken.append(f"{module} imports {name} inside a function")
            top = name.split(".")[0]
            if top == ROOT:
                target = name.removeprefix(ROOT).removeprefix(".")
                graph[module].add(target)
                below = target.split(".")[0]
                if part in APART:
                    broken.append(f"{module} stands apart, but imports {name}")
                elif below in APART and part and part != "testing":
                    broken.append(f"{module} imports {name}, which only testing may")
                elif not below and part:
                    broken.append(f"{module} imports the package itself, which imports everything")
                elif FLOORS.get(below, 0) > floor:
                    broken.append(f"{module} on floor {floor} imports {name} on floor {FLOORS[below]}")
            elif top == "torch" and floor < TORCH_FROM:
                broken.append(f"{module} on floor {floor} imports {name}, but torch begins on floor {TORCH_FROM}")
            elif top not in allowed and OWN_DEPENDENCY.get(top) != part:
                broken.append(f"{module} imports {name}, which is not required: go through {LATE_IMPORTER}")
        for node in ast.walk(ast.parse(source)):
            called = node.func if isinstance(node, ast.Call) else None
            named = getattr(called, "attr", getattr(called, "id", ""))
            if named in ("import_module", "__import__") and module != LATE_IMPORTER:
                broken.append(f"{module} calls {named}, which only {LATE_IMPORTER} may")
    if path := cycle(graph):
        broken.append(f"modules import each other: {' -> '.join(name or ROOT for name in path)}")
    return broken


def test_imports_point_down():
    assert problems(read_package()) == []


def test_every_module_is_read():
    assert {"", "errors", "operators", "operators.additive", "nn.attention", "reference"} <= set(read_package())


BROKEN = {
    "up": (
        {"modes": "from tensorattn.summary import Summary", "summary": ""},
        "modes on floor 1 imports tensorattn.summary on floor 4",
    ),
    "up by the module": (
        {"summary": "from tensorattn import operators", "operators": ""},
        "summary on floor 4 imports tensorattn.operators on floor 5",
    ),
    "up by a relative import": (
        {"stats.laws": "from ..diagnose import centred_error", "diagnose": "", "stats": ""},
        "stats.laws on floor 6 imports tensorattn.diagnose on floor 7",
    ),
    "up under another name": (
        {"softmax": "import tensorattn.nn.attention as attention", "nn.attention": ""},
        "softmax on floor 3 imports tensorattn.nn.attention on floor 6",
    ),
    "the package itself": (
        {"bench": "import tensorattn as ta"},
        "bench imports the package itself, which imports everything",
    ),
    "inside a function": (
        {"summary": "def f():\n    from tensorattn.modes import ModeSpec", "modes": ""},
        "summary imports tensorattn.modes inside a function",
    ),
    "inside a method, under a condition": (
        {"summary": "class A:\n    def f(self):\n        if self:\n            import math"},
        "summary imports math inside a function",
    ),
    "torch low": (
        {"planning": "import torch.nn"},
        "planning on floor 2 imports torch.nn, but torch begins on floor 3",
    ),
    "hypothesis": (
        {"diagnose": "from hypothesis import given"},
        "diagnose imports hypothesis, which is not required: go through attend.optional",
    ),
    "optional package": (
        {"attend.figures": "import matplotlib.pyplot as plt"},
        "attend.figures imports matplotlib.pyplot, which is not required: go through attend.optional",
    ),
    "hidden import": (
        {"attend.figures": "import importlib\nplt = importlib.import_module('matplotlib')"},
        "attend.figures calls import_module, which only attend.optional may",
    ),
    "unknown module": (
        {"transport": "import math"},
        "transport is on no floor: give 'transport' its floor in the table FLOORS of this test",
    ),
    "oracle leans on the package": (
        {"reference": "from tensorattn.modes import ModeSpec", "modes": ""},
        "reference stands apart, but imports tensorattn.modes",
    ),
    "package leans on the oracle": (
        {"softmax": "from tensorattn.reference import outer_sum", "reference": ""},
        "softmax imports tensorattn.reference, which only testing may",
    ),
    "cycle on one floor": (
        {"weights": "from tensorattn.softmax import a", "softmax": "from tensorattn.weights import b"},
        "modules import each other: softmax -> weights -> softmax",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_checker_finds(case):
    sources, problem = BROKEN[case]
    assert problems(sources) == [problem]


def test_the_checker_lets_pass():
    assert (
        problems({
            "": "from tensorattn.testing import strategies\nfrom tensorattn import reference",
            "testing.strategies": "import hypothesis\nimport torch\nfrom tensorattn.reference import outer_sum",
            "attend.optional": "import importlib\nimportlib.import_module('matplotlib')",
            "operators.additive": "from tensorattn.operators.operator import run\nimport torch, numpy, math",
            "operators.operator": "from .. import softmax\nfrom ..modes import ModeSpec",
            "softmax": "",
            "modes": "",
            "reference": "",
        })
        == []
    )  # fmt: skip


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


def test_importing_imports_nothing_optional():
    others = sorted(name for name in read_package() if name in NEEDING_NOT or name.split(".")[0] not in (*NEEDING, ""))
    package, modules, control = imported(
        f"import {ROOT}", "\n".join(f"import {ROOT}.{name}" for name in others), "import hypothesis.strategies"
    )
    assert (package, modules) == ([], [])
    assert "hypothesis" in control  # the probe does see what is imported
