"""For all tests: nothing is fetched, the cores are shared politely, and what needs a GPU says so when there is none."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported anywhere
os.environ["TERMINAL_WIDTH"] = "300"  # of typer: a message is one line, however long the paths in it are
# Tools of the extra dev lie beside Python: hadolint, kubectl.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported anywhere: its kernels run on the CPU

torch.set_num_threads(1)  # models this small only wait for each other's threads

# A slow machine is not a failure; a failure prints what reproduces it.
settings.register_profile("espalier", deadline=None, print_blob=True)
settings.load_profile("espalier")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "a CUDA device"
    if not (shutil.which("chromium") and find_spec("playwright") and find_spec("axe_playwright_python")):
        missing["browser"] = "chromium and the extra dev"
    for item in items:
        for mark, what in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=f"needs {what}"))
