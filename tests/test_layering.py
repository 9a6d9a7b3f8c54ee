"""Imports go one way.

    server → pruning.dynamic → models ← pruning.static

`models` imports nothing of ours. `pruning.samples` alone reads a world that ships with Espalier, and `pruning.layer_importance` is
measured by both halves; neither is part of serving. `pruning.finetuning` makes up for what both took away, and knows both.
`checkpoints` knows the shipped names and turns them into directories: only front doors (the server's, evals, benchmarks,
espalier.py) ask it, all else takes a directory. evals and benchmarks stand outside.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]

# Which of our own units each unit may import. A new one must be entered here before it can be imported at all.
PRUNING = {"pruning", "pruning.dynamic", "pruning.dynamic.training", "pruning.finetuning", "pruning.static"}
CHECKPOINTS = {f"checkpoints.{name}" for name in ("cache", "embedded", "smol", "things", "world")} | {"checkpoints"}
MAY_IMPORT = {
    "models": {"models"},
    "checkpoints.world": {"checkpoints.world"},
    "checkpoints.cache": set(),
    "checkpoints.things": {"checkpoints.things", "checkpoints.cache"},
    "checkpoints.embedded": {"checkpoints.embedded", "checkpoints.world", "models"},
    "checkpoints.smol": {"checkpoints.smol", "checkpoints.things", "models", "pruning.dynamic"},
    "checkpoints": CHECKPOINTS | {"models"},
    "pruning": {"pruning", "models", "checkpoints.things", "checkpoints.world"},
    "pruning.dynamic": {"pruning.dynamic", "models"},
    "pruning.dynamic.training": {"pruning.dynamic.training", "pruning.dynamic", "pruning", "models"},
    "pruning.static": {"pruning.static", "pruning", "models"},
    "pruning.finetuning": {"pruning.finetuning", "pruning.static", "pruning.dynamic", "pruning", "models"},
    "server": {"server", "pruning.dynamic", "models", "checkpoints"},
    "evals": {"evals", "benchmarks", "server", "models"} | PRUNING | CHECKPOINTS,
    "benchmarks": {"benchmarks", "evals", "server", "models"} | PRUNING | CHECKPOINTS,
    "espalier": {"benchmarks", "evals", "server", "models"} | PRUNING | CHECKPOINTS,
    "tests": set(),
}


def unit_of(module: str) -> str | None:
    """The unit of ours that holds a dotted name; None for the standard library and other people's packages."""
    return max((unit for unit in MAY_IMPORT if f"{module}.".startswith(f"{unit}.")), key=len, default=None)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in `tree`, lazy, type-only and `import_module("literal")` ones included.

    `from a import b` yields `a.b`, since b may be a module; relative ones are resolved against `package`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            for alias in node.names:
                yield node.lineno, ".".join([*parents, *filter(None, [node.module]), alias.name])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def forbidden(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """The imports in `source` that go against the arrows, each as "line N: name"."""
    allowed = MAY_IMPORT.get(unit_of(module) or "", set())
    package = module if is_package else module.rpartition(".")[0]
    found = [(line, name, unit_of(name)) for line, name in imports_of(ast.parse(source), package)]
    return [f"line {line}: {name}" for line, name, unit in found if unit is not None and unit not in allowed]


def sources() -> list[Path]:
    """Every Python file that is installed."""
    packages = sorted(path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
    return sorted([*ROOT.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))])


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_follow_the_arrows(path: Path) -> None:
    wrong = forbidden(path.read_text(encoding="utf-8"), module_of(path), is_package=path.name == "__init__.py")
    assert not wrong, f"{path.relative_to(ROOT)} may not import {', '.join(wrong)}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.llava", "import server"),
        ("models.checkpoint", "from checkpoints.shipped import resolve"),
        ("checkpoints.world.shapes", "from models import images"),
        ("pruning.static.recipe", "from checkpoints.world import FAMILIES"),
        ("pruning.dynamic.levels", "from pruning import samples"),
        ("server.run", "from checkpoints import world"),
        ("models.llava", "def f():\n    from pruning.dynamic.levels import Level"),
        ("models.llava", "if TYPE_CHECKING:\n    from server.request import Request"),
        ("pruning.dynamic.levels", "from pruning import static"),
        ("pruning.dynamic.levels", "from ..static import obs"),
        ("pruning.dynamic.planner", "from pruning.dynamic.training import config"),
        ("pruning.static.obs", "from .. import dynamic"),
        ("pruning.static.obs", "from server import engine"),
        ("server.app", "import pruning.static.obs"),
        ("server.engine", "from pruning.dynamic.training.teacher import margins"),
        ("server.app", "import importlib\nimportlib.import_module('evals.scenes')"),
        ("server.app", "from tests import conftest"),
        ("evals.scenes", "import espalier"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert forbidden(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.llava", "from .route import Route\nimport torch"),
        ("pruning.dynamic.levels", "from models.route import Route\nfrom . import tokens"),
        ("pruning.static.recipe", "from pruning import samples"),
        ("server.run", "from checkpoints.shipped import resolve"),
        ("server.app", "from pruning.dynamic import levels\nfrom server.engine import Engine\nimport serverless"),
        ("evals.scenes", "from server.engine import Engine\nfrom pruning.static import obs"),
    ],
)
def test_a_right_import_is_let_through(module: str, source: str) -> None:
    assert not forbidden(source, module)


def test_the_scheduler_is_pure_python() -> None:
    tree = ast.parse((ROOT / "server" / "scheduler.py").read_text(encoding="utf-8"))
    assert not [name for _, name in imports_of(tree, "server") if name.split(".")[0] == "torch"]


def test_policy_stays_out_of_the_engine() -> None:
    """It knows a planner and what it returns, and no more of `pruning.dynamic`."""
    tree = ast.parse((ROOT / "server" / "engine.py").read_text(encoding="utf-8"))
    assert len([name for _, name in imports_of(tree, "server") if unit_of(name) == "pruning.dynamic"]) <= 3


def test_pyproject_lists_what_there_is() -> None:
    files = sources()
    assert sorted(SETUPTOOLS["py-modules"]) == [p.stem for p in files if p.parent == ROOT and p.stem != "setup"]
    directories = {path.parent for path in files} - {ROOT}
    assert sorted(SETUPTOOLS["packages"]) == sorted(".".join(path.relative_to(ROOT).parts) for path in directories)
    assert not [path for path in directories if not (path / "__init__.py").exists()]
