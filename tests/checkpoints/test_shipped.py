"""The checkpoints that come with Espalier: found by name, called by name, and never written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints.shipped import SHIPPED, resolve
from models.checkpoint import check_files
from models.errors import CheckpointError
from models.manifest import read_manifest


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
