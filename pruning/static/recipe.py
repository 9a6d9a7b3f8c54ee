"""What `espalier prune` is asked to do. Its fields are the options of the command and the keys of a recipe file.

Imports little, so that `espalier --help` opens at once.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.errors import faults
from pruning.seed import Seed

MIN_SAMPLES, MIN_SEARCH_SAMPLES = 4, 16
"""The search needs more: it holds a quarter of them out."""


class RecipeError(ValueError):
    """The recipe cannot be carried out; the message names the key and says what to do."""


class Recipe(BaseModel):
    """Every setting that decides which weights go."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    criterion: Literal["magnitude", "wanda", "obs", "alps"] = Field(
        "obs", description="What decides which weights of a matrix go. alps loses less than obs, and takes longer."
    )
    pattern: Literal["unstructured", "2:4", "structured"] = Field(
        "unstructured", description="Any weight, two of every four in a row, or whole attention heads and FFN neurons."
    )
    sparsity: float = Field(0.5, ge=0, lt=1, description="Share of the weights of the language model's blocks that goes.")
    tower: float = Field(0, ge=0, lt=1, description="structured: share of the weights of the vision transformer's layers, too.")
    allocation: Literal["uniform", "ecoflap", "owl", "search"] = Field(
        "uniform", description="How the sparsity is spread over the blocks, or by search over the matrices."
    )
    score: Literal["zo", "fo"] = Field("zo", description="ecoflap: scores of zeroth order, or of first order by gradients.")
    eta: float = Field(0.3, ge=0, description="search: weight of structural risk; helps obs alone.")
    projector: bool = Field(True, description="search: tune the projector on the best policies, in turns with the search.")
    samples: int = Field(64, ge=MIN_SAMPLES, description="Calibration samples.")
    seed: Seed = Field(0, description="Which samples, and every random choice.")
    data: str = Field("", description="A JSONL file (docs/pruning.md), world or things; what it was trained on by default.")
    families: tuple[str, ...] = Field((), description="world, things: draw from these families alone, not from all; may repeat.")

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.tower and self.pattern != "structured":
            raise ValueError("tower needs pattern structured")
        if not (self.sparsity or self.tower):
            raise ValueError("sparsity 0 prunes nothing, unless tower is above 0")
        if self.pattern != "unstructured" and self.allocation != "uniform":
            raise ValueError(f"pattern {self.pattern} needs allocation uniform")
        if self.pattern == "structured" and self.criterion == "alps":
            raise ValueError("criterion alps removes single weights; pattern structured needs obs, wanda or magnitude")
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError("pattern 2:4 means sparsity 0.5")
        for name, owner in (("score", "ecoflap"), ("eta", "search")):
            if self.allocation != owner and getattr(self, name) != Recipe.model_fields[name].default:
                raise ValueError(f"{name} needs allocation {owner}, and would do nothing here")
        if self.allocation == "search" and self.samples < MIN_SEARCH_SAMPLES:
            raise ValueError(f"allocation search needs samples {MIN_SEARCH_SAMPLES} or more; 64 is usual")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Of the weights that go, by module. The tower comes first: the language model is pruned on what it then shows."""
        return {module: share for module, share in (("vision", self.tower), ("language", self.sparsity)) if share}


def read(path: Path | None, options: dict[str, Any]) -> Recipe:
    """The recipe in a TOML file, overridden by `options`. Raises RecipeError naming the key."""
    try:
        settings = tomllib.loads(path.read_text()) if path else {}
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    try:
        return Recipe(**settings | options)
    except ValidationError as error:
        first = faults(error)[0]
        raise RecipeError(f"{path}: {first}" if path and first.key else str(first)) from error
