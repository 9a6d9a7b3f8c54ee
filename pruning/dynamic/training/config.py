"""What a router is taught, and how long."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Lesson(BaseModel):
    """Written into the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field("", description="A JSONL file (docs/pruning.md), or world; what the checkpoint was trained on by default.")
    pictures: int = Field(3000, ge=8, description="A third of them is held out, to judge by.")
    questions: int = Field(4, ge=1, description="Of each picture, at most; drawn from those that there are.")
    answer: int = Field(64, ge=1, description="Tokens of an answer that are watched.")
    rows: int = Field(0, ge=0, multiple_of=8, description="The router's width; an eighth of the model's by default, 64 at least.")
    steps: int = Field(2500, ge=1, description="Of learning to foresee.")
    writing: int = Field(2500, ge=0, description="Steps of learning to write into merged tokens.")
    batch: int = Field(32, ge=1)
    rate: float = Field(3e-3, gt=0)
    writing_rate: float = Field(2e-3, gt=0)
    target: float = Field(0.99, gt=0, le=1, description="Share of answers that level `auto` is to keep.")
    seed: int = 0

    @property
    def taught(self) -> int:
        """Pictures that are learned from; the others are held out."""
        return self.pictures - max(2, self.pictures // 3)
