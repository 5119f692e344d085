"""What the package shows: names that exist, documentation that is there, records that agree with their functions."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import tensorattn
from tensorattn.operators import OPERATORS

PROJECT = Path(tensorattn.__file__).parent.parent / "pyproject.toml"
SECTIONS = ("Args", "Returns", "Raises", "Attributes", "Shape", "Examples", "References", "Notes")
ORDER = ("Args", "Attributes", "Returns", "Raises", "Shape", "Examples", "References")

MODULES = sorted(
    ["tensorattn", *(m.name for m in pkgutil.walk_packages(tensorattn.__path__, "tensorattn.") if m.name[-3:] != "n__")]
)
FACES = [  # what a user imports from: these modules, and the packages that re-export
    name
    for name in MODULES
    if name
    in (
        "tensorattn",
        "tensorattn.diagnose",
        "tensorattn.distributed",
        "tensorattn.models",
        "tensorattn.nn",
        "tensorattn.reference",
        "tensorattn.stats",
        "tensorattn.streaming",
        "tensorattn.testing",
    )
]


def exported(module):
    return [getattr(module, name) for name in module.__all__]


def parameters(function):
    """Parameters that a caller passes, as they are written in an Args section."""
    found = list(inspect.signature(function).parameters.values())
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [stars.get(p.kind, "") + p.name for p in found if p.name not in ("self", "cls") and p.name[0] != "_"]


def sections(docstring):
    """Text of each section of a Google docstring, in the order it has them."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):$", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def returns_something(function):
    """Whether a function, not a method, has a result to describe."""
    signature = inspect.signature(function)
    return not {"self", "cls"} & set(signature.parameters) and signature.return_annotation not in (None, "None")


def undocumented(name, function):
    """What is missing in the docstring of a function with parameters."""
    if not function.__doc__:
        return [f"{name} has no docstring"]
    found = sections(function.__doc__)
    if not parameters(function):
        return []
    missing = []
    documented = re.findall(r"^ +(\*{0,2}\w+):", found.get("Args", ""), flags=re.MULTILINE)
    if documented != parameters(function):
        missing.append(f"{name} takes {parameters(function)}, but Args documents {documented}")
    summary = function.__doc__.split("\n")[0]
    if returns_something(function) and "Returns" not in found and not summary.startswith("Return "):
        missing.append(f"{name} returns something, but has no section Returns")
    if list(found) != [section for section in ORDER if section in found]:
        missing.append(f"{name} has the sections {list(found)}, which are not in the order of the house")
    return missing


def public_functions():
    """Every function a user imports, and every method of a class a user imports, once, by its full name."""
    found = {}
    for face in FACES:
        for thing in exported(importlib.import_module(face)):
            if not getattr(thing, "__module__", "").startswith("tensorattn"):
                continue
            if inspect.isfunction(thing):
                found[f"{thing.__module__}.{thing.__qualname__}"] = thing
            elif inspect.isclass(thing):
                for name, member in vars(thing).items():
                    method = inspect.unwrap(getattr(member, "__func__", member))
                    if inspect.isfunction(method) and "_" not in (name[0], method.__name__[0]):
                        found[f"{thing.__module__}.{thing.__qualname__}.{name}"] = method
    return found


FUNCTIONS = public_functions()


@pytest.mark.parametrize("name", MODULES)
def test_every_exported_name_exists_and_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    for exported_name in names:
        assert hasattr(module, exported_name), f"{name}.__all__ lists {exported_name!r}, which does not exist"
        thing = getattr(module, exported_name)
        if inspect.isfunction(thing) or (inspect.isclass(thing) and thing.__module__.startswith("tensorattn")):
            assert thing.__doc__, f"{name}.{exported_name} has no docstring"
            assert not thing.__doc__.startswith(f"{thing.__name__}("), f"{exported_name} has a generated docstring"


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".") == 1 and "__" not in name])
def test_every_module_says_what_it_exports(name):
    module = importlib.import_module(name)
    own = [thing for thing in vars(module).values() if getattr(thing, "__module__", None) == name]
    assert not own or hasattr(module, "__all__")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_and_results_are_documented(name):
    assert undocumented(name, FUNCTIONS[name]) == []


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


@pytest.mark.parametrize(
    "name", [name for name in tensorattn.__all__ if inspect.isfunction(getattr(tensorattn, name, None))]
)
def test_every_function_shows_an_example(name):
    examples = sections(getattr(tensorattn, name).__doc__).get("Examples", "")
    assert ">>> " in examples, f"{name} has no example"


def test_every_operator_is_exported():
    for operator in OPERATORS.values():
        assert operator.function.__name__ in tensorattn.__all__
        assert getattr(tensorattn, operator.function.__name__) is operator.function


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_the_common_signature_and_its_options(name):
    operator = OPERATORS[name]
    ours, common = (inspect.signature(f).parameters for f in (operator.function, tensorattn.flattened_attention))
    options = {k: p.default for k, p in ours.items() if k not in common}
    assert options == dict(operator.options)
    assert [k for k in ours if k in common] == list(common)
    for parameter in common:
        assert ours[parameter].kind == common[parameter].kind
        assert ours[parameter].default == common[parameter].default
        assert ours[parameter].annotation == common[parameter].annotation


def test_the_registry_knows_operators_by_their_own_name():
    assert all(name == operator.name for name, operator in OPERATORS.items())
    assert tensorattn.get_operator("additive") is OPERATORS["additive"]


def test_types_ship():
    assert (files("tensorattn") / "py.typed").is_file()
    build = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert build["wheel"]["packages"] == ["tensorattn"]  # whole: the marker of types with it


def test_the_version_is_that_of_the_project():
    assert tensorattn.__version__ == tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["version"]
