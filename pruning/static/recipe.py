"""What a pruning run is asked to do: read from flags or a TOML file, and checked before any work."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from checkpoints.world import FAMILIES
from models.checkpoint import check_files, resolve
from models.manifest import read_manifest
from models.run_state import run_directory
from pruning.static import patterns

WORLD = "world"
"""The calibration data that ships with Espalier."""
FEWEST = {"search": 16, "any": 4}
"""Samples: the search holds a quarter of them out."""


class RecipeError(ValueError):
    """The recipe cannot be carried out; the message names the key and says what to do."""


class Recipe(BaseModel):
    """Every setting of `espalier prune`; the same names as its flags and as the keys of a recipe file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    criterion: Literal["magnitude", "wanda", "obs"] = "obs"
    pattern: str = Field(default="unstructured", description="unstructured, n:m such as 2:4, or structured.")
    sparsity: float = Field(default=0.5, ge=0, lt=1, description="Share of the language model's matrices that goes.")
    vision_sparsity: float = Field(default=0.0, ge=0, lt=1, description="The same of the vision tower.")
    allocation: Literal["uniform", "ecoflap", "owl", "search"] = "uniform"
    score: Literal["zo", "fo"] = Field(default="zo", description="ECoFLaP's score: zeroth order, or first order by gradients.")
    maximum: float | None = Field(default=None, gt=0, le=1, description="Most that a block may lose; sparsity + 0.1 if not given.")
    average: bool = Field(default=False, description="Divide a block's score by its size (ECoFLaP's avg).")
    shared_budget: bool = Field(default=False, description="One budget over both towers: the allocation decides what each loses.")
    samples: int = Field(default=64, ge=1, description="Calibration samples.")
    seed: int = 0
    data: str = Field(default=WORLD, description="`world`, or a JSONL file of {image, question, answer} or LLaVA's conversations.")
    families: tuple[str, ...] = Field(default=FAMILIES, description="Of the world: the families that are sampled.")
    visual_weight: float = Field(default=1.0, ge=0, description="What a visual row counts in the statistics; a text row counts 1.")
    damping: float = Field(default=0.01, gt=0, description="Share of the Hessian's mean diagonal that is added to it.")
    block_size: int = Field(default=128, ge=1, description="Columns that OBS prunes before it updates those to their right.")
    uniform_width: bool = Field(default=False, description="structured: the same widths in every layer, which transformers loads.")
    levels: int = Field(default=4, ge=1, description="search: levels on either side of the target that a matrix may take.")
    generations: int = Field(default=40, ge=1, description="search: generations in all.")
    offspring: int = Field(default=16, ge=2, description="search: policies tried in a generation.")
    eta: float = Field(default=0.3, ge=0, description="search: weight of structural risk, in both terms' spread; helps obs alone.")
    projector: bool = Field(default=True, description="search: tune the projector on the best policies, in turns with the search.")
    rounds: int = Field(default=2, ge=1, description="search: turns of search and projector.")
    reconstruct: int = Field(default=0, ge=0, description="Steps of block-wise reconstruction against dense activations.")

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.pattern != "structured":
            patterns.parse(self.pattern)
        elif self.allocation != "uniform" or self.reconstruct:
            raise ValueError(
                "structured pruning spends its budget evenly and compensates by itself: allocation uniform, reconstruct 0"
            )
        if isinstance(self.parsed, patterns.NM):
            if self.allocation != "uniform":
                raise ValueError(f"pattern {self.pattern} fixes what each matrix loses: allocation must be uniform")
            if self.sparsity not in (self.parsed.sparsity, 0):
                raise ValueError(f"pattern {self.pattern} means sparsity {self.parsed.sparsity:g} (or 0, to leave a tower alone)")
            if self.vision_sparsity not in (self.parsed.sparsity, 0):
                raise ValueError(f"pattern {self.pattern} means vision_sparsity {self.parsed.sparsity:g} or 0")
        if not self.sparsity and not self.vision_sparsity:
            raise ValueError("sparsity and vision_sparsity are both 0: there is nothing to prune")
        highest = max(self.sparsity, self.vision_sparsity)
        if self.maximum is not None and self.maximum < highest:
            raise ValueError(f"maximum {self.maximum:g} is below sparsity {highest:g}: the target could not be reached")
        if self.allocation == "search" and not self.sparsity:
            raise ValueError("allocation search is for the language model: its sparsity must be above 0")
        if self.allocation == "search" and self.rounds > self.generations:
            raise ValueError(f"rounds {self.rounds} are more than generations {self.generations}")
        if self.uniform_width and self.pattern != "structured":
            raise ValueError("uniform_width is for pattern structured")
        if self.shared_budget and self.allocation not in ("ecoflap", "owl"):
            raise ValueError("shared_budget needs an allocation that compares blocks of both towers: ecoflap or owl")
        if self.shared_budget and self.vision_sparsity:
            raise ValueError("shared_budget has one target, sparsity: leave vision_sparsity out")
        fewest = FEWEST["search" if self.allocation == "search" else "any"]
        if self.samples < fewest:
            raise ValueError(f"samples {self.samples} are too few: {fewest} at least, and 64 is usual")
        if unknown := set(self.families) - set(FAMILIES):
            raise ValueError(f"families: {', '.join(sorted(unknown))} is not one of {', '.join(FAMILIES)}")
        return self

    @property
    def parsed(self) -> patterns.Pattern:
        """The pattern of a mask; a structured run has none and reads as unstructured."""
        return patterns.Unstructured() if self.pattern == "structured" else patterns.parse(self.pattern)

    def largest_loss(self, sparsity: float) -> float:
        """ECoFLaP's per-block maximum at a budget of `sparsity`."""
        return min(self.maximum if self.maximum is not None else sparsity + 0.1, 1.0)

    @property
    def towers(self) -> list[str]:
        wanted = {"vision": self.vision_sparsity, "language": self.sparsity}
        return [tower for tower, sparsity in wanted.items() if sparsity or self.shared_budget]


def read(path: Path | None, given: dict[str, Any]) -> Recipe:
    """The recipe in a TOML file, with what was given as flags on top. Raises RecipeError naming the key."""
    try:
        asked = tomllib.loads(path.read_text()) if path else {}
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    settings = {**asked, **given}
    if "pattern" in settings and "sparsity" not in settings and ":" in str(settings["pattern"]):
        settings["sparsity"] = getattr(_pattern(str(settings["pattern"])), "sparsity", 0.5)
    try:
        return Recipe(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{path}: {where}: {reason}" if path and where else f"{where}: {reason}" if where else reason) from error


def _pattern(text: str) -> patterns.Pattern:
    try:
        return patterns.parse(text)
    except ValueError as error:
        raise RecipeError(f"pattern: {error}") from error


def check(recipe: Recipe, checkpoint: str, out: Path) -> Path:
    """The checkpoint's directory, once all that can be known before the work is known to be fine. Raises RecipeError."""
    directory = resolve(checkpoint)
    shards = check_files(directory)
    if read_manifest(directory).pruning:
        raise RecipeError(f"{directory} is pruned already; prune the dense checkpoint that it was made from")
    if out.exists():
        raise RecipeError(f"{out} exists; name a directory that does not, or remove it")
    if not out.parent.is_dir():
        raise RecipeError(f"{out.parent} is not a directory; create it first")
    if recipe.data != WORLD and not Path(recipe.data).is_file():
        raise RecipeError(f"data: {recipe.data} is not a file; name a JSONL file, or `{WORLD}`")
    # The result and the finished blocks; the search keeps every level of every matrix, and the dense one.
    copies = 2 + (2 * recipe.levels + 2 if recipe.allocation == "search" else 0)
    there = sum(path.stat().st_size for path in run_directory(out).rglob("*") if path.is_file())
    needed = copies * sum(shard.stat().st_size for shard in shards) - there
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise RecipeError(f"{out.parent} has {free / 1e9:.1f} GB free and up to {needed / 1e9:.1f} GB are needed; make room")
    return directory
