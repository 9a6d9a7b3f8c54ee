"""The tiny checkpoint that runs are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.tiny import write


@pytest.fixture(scope="module", name="dense")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dense") / "dense")
