"""The checkpoints that come with Espalier: found by name, called by name, and never written to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints.shipped import SHIPPED, build_smol, resolve, smol_directory
from models.checkpoint import check_files
from models.errors import CheckpointError
from models.manifest import MANIFEST, read_manifest


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_checkpoint_is_whole_and_knows_its_name(name: str) -> None:
    directory = resolve(name)
    assert check_files(directory)
    manifest = read_manifest(directory)
    assert (manifest.name, manifest.trained_on) == (f"espalier-{name}", "world")


def test_a_path_is_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == resolve(str(tmp_path), write=True) == tmp_path


def test_what_is_no_directory_is_told_the_names() -> None:
    with pytest.raises(CheckpointError, match=r"nowhere is not a directory.*embedded, embedded-dense"):
        resolve("nowhere")


def test_a_shipped_checkpoint_is_not_written_to_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"embedded ships with Espalier and stays as it is: copy .*pruned, "):
        resolve("embedded", write=True)
    assert resolve(str(SHIPPED["embedded"]), write=True) == SHIPPED["embedded"]


def test_a_directory_of_another_checkpoint_is_not_taken_for_smol() -> None:
    with pytest.raises(CheckpointError, match=r"dense holds espalier-embedded-dense; remove it, or build into another directory"):
        build_smol(SHIPPED["embedded-dense"])


def test_builds_of_other_releases_are_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(directory: Path, tell: Callable[[str], None]) -> Path:
        directory.mkdir(parents=True)
        (directory / MANIFEST).touch()
        return directory

    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path))
    monkeypatch.setattr("checkpoints.smol.build.build", write)
    other = smol_directory().with_name("smol-0123abcd")
    write(other, print)
    told: list[str] = []
    assert build_smol(tell=told.append) == build_smol(tell=told.append) == smol_directory()
    assert told == [f"{other} is of another release; unless that is in use too, remove it"]
    build_smol(tmp_path / "elsewhere", told.append)
    assert len(told) == 1 and other.exists()
