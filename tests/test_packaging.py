"""What is installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = {".py", ".pyc", ".cpp", ".h", ".so"}
"""Modules, and kernels that are built from their sources before they are installed."""


def test_files_beside_the_modules_are_installed_with_them() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {ROOT / package.replace(".", "/"): package for package in setuptools["packages"]}
    installed, found = set(), set()
    for folder, package in folders.items():
        for pattern in setuptools["package-data"].get(package, []):
            matched = set(folder.glob(pattern))
            assert matched, f"nothing in {package} matches {pattern}"
            installed |= matched
        found |= {path for path in folder.rglob("*") if path.is_file() and path.suffix not in SOURCES}
    assert found <= installed, sorted(str(path.relative_to(ROOT)) for path in found - installed)
