"""How a router is trained."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from pruning.seed import Seed


class TrainingConfig(BaseModel):
    """Written into the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field("", description="A JSONL file (docs/pruning.md), world or things; what it was trained on by default.")
    pictures: int = Field(3000, ge=8, description="A third of them is held out, to measure on.")
    questions: int = Field(4, ge=1, description="Of each picture, at most; drawn from those that there are.")
    answer_tokens: int = Field(64, ge=1, description="Most tokens of an answer.")
    width: int = Field(0, ge=0, multiple_of=8, description="The router's width; an eighth of the model's by default, 64 at least.")
    steps: int = Field(2500, ge=1, description="Training steps of the scores.")
    corrector_steps: int = Field(2500, ge=0, description="Training steps of the merge corrector.")
    batch_size: int = Field(32, ge=1, description="Questions in a step.")
    learning_rate: float = Field(3e-3, gt=0, description="Of the scores.")
    corrector_learning_rate: float = Field(2e-3, gt=0, description="Of the merge corrector.")
    target_agreement: float = Field(0.99, gt=0, le=1, description="Share of answers that level `auto` is to keep.")
    seed: Seed = Field(0, description="Which pictures, and every random choice.")

    @property
    def picture_seed(self) -> int:
        """Which pictures: not the drawings that masks were made on. A file has no others to give."""
        return self.seed + 1000

    @property
    def training_pictures(self) -> int:
        """Pictures that are learned from; the others are held out."""
        return self.pictures - max(2, self.pictures // 3)
