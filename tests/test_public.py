"""What the package shows: names that exist, documentation that is there, records that agree with their functions."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import tomllib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import tensorattn
from tensorattn.functional.operator import Shared

PROJECT = Path(tensorattn.__file__).parent.parent / "pyproject.toml"
ORDER = ("Args", "Attributes", "Returns", "Raises", "Shape", "Examples", "References")
SHARED = "What all operators share:"  # the functions of operators end in what the room tells once

MODULES = {
    name: importlib.import_module(name)
    for name in ("tensorattn", *(found.name for found in pkgutil.walk_packages(tensorattn.__path__, "tensorattn.")))
    if not name.endswith("__main__")
}
FACES = [  # what a user imports from
    name for name in MODULES if name.count(".") < 2 and hasattr(MODULES[name], "__path__") and name != "tensorattn.cli"
]
PUBLIC = {name: getattr(tensorattn, name) for name in tensorattn.__all__}


def parameters(function: Callable[..., Any]) -> list[str]:
    """Parameters that a caller passes, as they are written in an Args section."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found = inspect.signature(function).parameters.values()
    return [
        stars.get(each.kind, "") + each.name
        for each in found
        if each.name not in ("self", "cls") and each.name[0] != "_"
    ]


def sections(docstring: str) -> dict[str, str]:
    """Text of each section of a Google docstring, in the order it has them."""
    parts = re.split(rf"^({'|'.join(ORDER)}):$", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def undocumented(name: str, function: Callable[..., Any]) -> list[str]:
    """What is missing in the docstring of a function."""
    if not function.__doc__:
        return [f"{name} has no docstring"]
    docstring, taken = function.__doc__.partition(SHARED)[0], parameters(function)
    if not taken:
        return []
    if SHARED in function.__doc__:
        taken = [*(each for each in taken if each not in Shared.__annotations__), "**shared"]
    found, missing = sections(docstring), []
    documented = re.findall(r"^ +(\*{0,2}\w+):", found.get("Args", ""), flags=re.MULTILINE)
    documented = [each for each in documented if each != "draw"]  # which Hypothesis gives to a strategy
    if documented != taken:
        missing.append(f"{name} takes {taken}, but Args documents {documented}")
    signature = inspect.signature(function)
    returns = signature.return_annotation not in (None, "None") and not {"self", "cls"} & set(signature.parameters)
    if returns and "Returns" not in found and not docstring.startswith(("Return ", "Draw ")):
        missing.append(f"{name} returns something, but has no section Returns")
    if list(found) != [section for section in ORDER if section in found]:
        missing.append(f"{name} has the sections {list(found)}, which are not in the order of the house")
    return missing


def public_functions() -> dict[str, Callable[..., Any]]:
    """Every function a user imports, and every method of a class a user imports, once, by its full name."""
    found = {}
    for face in FACES:
        for thing in (getattr(MODULES[face], name) for name in MODULES[face].__all__):
            if inspect.isfunction(thing):
                found[f"{thing.__module__}.{thing.__qualname__}"] = thing
            elif inspect.isclass(thing) and thing.__module__.startswith("tensorattn"):
                for name, member in vars(thing).items():
                    method = inspect.unwrap(getattr(member, "__func__", member))
                    if inspect.isfunction(method) and "_" not in (name[0], method.__name__[0]):
                        found[f"{thing.__module__}.{thing.__qualname__}.{name}"] = method
    return found


def test_every_module_is_documented_and_exports_what_exists():
    wrong = [f"{name} has no docstring" for name, module in MODULES.items() if not module.__doc__]
    for name, module in MODULES.items():
        names = list(getattr(module, "__all__", []))
        wrong += [f"{name} exports {each} twice" for each in set(names) if names.count(each) > 1]
        wrong += [f"{name} exports {each}, which does not exist" for each in names if not hasattr(module, each)]
        own = [each for each, thing in vars(module).items() if getattr(thing, "__module__", None) == name]
        if not hasattr(module, "__all__") and any(each[0] != "_" for each in own):
            wrong.append(f"{name} does not say what it exports")
    assert "\n".join(wrong) == ""


def test_every_face_is_seen():
    rooms = ["averages", "diagnose", "functional", "integrations", "models", "nn", "testing"]
    assert ["tensorattn", *(f"tensorattn.{room}" for room in rooms)] == FACES
    assert len(public_functions()) > 100


def test_what_the_rooms_show_the_package_shows_too():
    """But for what only those who test or extend need."""
    hidden = {
        "Step", "EXACT_LIMIT", "attention_operation", "centred_error", "sample_positions", "takes_any_positions",
        "dense_kronecker", "spread_attention",
    }  # fmt: skip
    shown = {name for face in FACES if face != "tensorattn.testing" for name in MODULES[face].__all__}
    assert shown - set(PUBLIC) <= hidden


def test_arguments_and_results_are_documented():
    wrong = [problem for name, function in public_functions().items() for problem in undocumented(name, function)]
    assert "\n".join(wrong) == ""


def test_the_checker_of_docstrings_can_fail():
    def nothing(x: int) -> int:
        return x

    def wrong(x: int, *others: int) -> int:
        """Do.

        Raises:
            ValueError: Never.

        Args:
            y: A number.
        """
        return x

    def right(x: int, **options: int) -> int:
        """Do.

        Args:
            x: A number.
            **options: More numbers.

        Returns:
            A number.
        """
        return x

    assert undocumented("nothing", nothing) == ["nothing has no docstring"]
    assert undocumented("wrong", wrong) == [
        "wrong takes ['x', '*others'], but Args documents ['y']",
        "wrong returns something, but has no section Returns",
        "wrong has the sections ['Raises', 'Args'], which are not in the order of the house",
    ]
    assert undocumented("right", right) == []


def test_every_public_name_shows_an_example():
    errors = {name for name, thing in PUBLIC.items() if inspect.isclass(thing) and issubclass(thing, ValueError)}
    bare = {name for name, thing in PUBLIC.items() if ">>> " not in (thing.__doc__ or "")}
    assert bare == errors - {"TensorAttentionError"} | {"OPERATORS"}


def test_every_operator_is_exported():
    assert all(PUBLIC.get(each.function.__name__) is each.function for each in tensorattn.OPERATORS.values())
    assert all(name == each.name for name, each in tensorattn.OPERATORS.items())


@pytest.mark.parametrize("name", tensorattn.OPERATORS)
def test_every_operator_has_the_common_signature_and_its_options(name):
    operator = tensorattn.OPERATORS[name]
    ours, common = (inspect.signature(each).parameters for each in (operator.function, tensorattn.flattened_attention))
    assert {key: each.default for key, each in ours.items() if key not in common} == dict(operator.options)
    assert [each for key, each in ours.items() if key in common] == list(common.values())
    assert list(common) == ["query", "key", "value", "order", *Shared.__annotations__]


def test_types_ship():
    assert (files("tensorattn") / "py.typed").is_file()
    build = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert build["wheel"]["packages"] == ["tensorattn"]  # whole: the marker of types with it


def test_the_version_is_that_of_the_project():
    assert tensorattn.__version__ == tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["version"]
