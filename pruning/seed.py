"""The seed of a run. Imports little, so that `espalier --help` opens at once."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Seed = Annotated[int, Field(gt=-(2**32), lt=2**32)]
"""Of 32 bits: a generator takes 64, and runs make one seed for each step out of it."""
