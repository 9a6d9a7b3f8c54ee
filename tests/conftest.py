"""For all tests: nothing is fetched, the cores are shared politely, and what needs a GPU says so when there is none."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported anywhere

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # models this small only wait for each other's threads

# A slow machine is not a failure; a failure prints what reproduces it.
settings.register_profile("espalier", deadline=None, print_blob=True)
settings.load_profile("espalier")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
