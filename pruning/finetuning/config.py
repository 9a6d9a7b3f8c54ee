"""How a checkpoint is trained further. Imports little, so that `espalier --help` opens at once."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pruning.seed import Seed


class FinetuneConfig(BaseModel):
    """Written into the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field("", description="A JSONL file (docs/pruning.md), world or things; what it was trained on by default.")
    samples: int = Field(2000, ge=1, description="Pictures of an epoch, each with all its questions.")
    epochs: int = Field(1, ge=1, description="Times through the data; drawn pictures are new each time.")
    levels: tuple[Literal["off", "light", "balanced", "strong"], ...] = Field(
        ("off",), min_length=1, description="Pictures take turns to be merged into the visual tokens of these levels; may repeat."
    )
    batch_size: int = Field(8, ge=1, description="Pictures of a step.")
    rank: int = Field(32, ge=1, description="Of what is added to a matrix (LoRA).")
    learning_rate: float = Field(5e-4, gt=0, description="The highest; it rises for a tenth of the steps and falls to nothing.")
    seed: Seed = Field(0, description="Which samples in which order, and where LoRA starts.")

    @property
    def steps(self) -> int:
        """The last pictures of an epoch that fill no batch are left out."""
        return self.samples // self.batch_size * self.epochs
