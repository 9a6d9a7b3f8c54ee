"""The meta-router: reads picture and question once and scores every visual token, for any budget.

After PAR's meta-router (Pruning All-Rounder, arXiv 2412.06458, figure 3), with three changes of ours. Attention is bidirectional,
so that a visual token's score depends on the question. The rows are narrow, so that all of it costs under 3 % of a dense prefill.
And a score is a quantity that can be checked: the logarithm of the attention that the un-pruned model will pay (see `gaze`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.checkpoint import Checkpoint, CheckpointError
from models.llava import Llava
from models.vision import ImageFeatures

FILE = "router.safetensors"
PERIOD = 100.0
"""Longest wave of the places' encoding, in patches or words."""


@dataclass(frozen=True)
class Shape:
    """The language model's `width`, and the router's own width of `rows`, `depth` in layers, and `heads`."""

    width: int
    rows: int
    depth: int = 2
    heads: int = 4

    def document(self) -> dict[str, int]:
        return asdict(self)

    def flops(self, rows: int) -> int:
        """Multiply-adds times two for `rows` visual tokens and words."""
        return 2 * rows * (self.rows * self.width + self.depth * (12 * self.rows**2 + 2 * rows * self.rows))


class RouterBlock(nn.Module):
    def __init__(self, rows: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(rows), nn.RMSNorm(rows)
        self.qkv, self.out = nn.Linear(rows, 3 * rows), nn.Linear(rows, rows)
        self.up, self.down = nn.Linear(rows, 4 * rows), nn.Linear(4 * rows, rows)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Router(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, rows = shape.width, shape.rows
        self.see, self.read = nn.Linear(width, rows), nn.Linear(width, rows)
        self.blocks = nn.ModuleList(RouterBlock(rows, shape.heads) for _ in range(shape.depth))
        self.norm, self.head = nn.RMSNorm(rows), nn.Linear(rows, 1)

    def forward(self, visual: Tensor, words: Tensor, present: Tensor | None = None) -> Tensor:
        """Scores [batch, tokens], float32, of one picture each.

        visual [batch, tokens, width], projected; words [batch, n, width], the question's embeddings, of which `present` [batch, n]
        are there.
        """
        tokens, n, rows = visual.shape[1], words.shape[1], self.shape.rows
        seen = self.see(_normal(visual)) + grid(tokens, rows).to(visual.device)
        read = self.read(_normal(words)) + waves(torch.arange(n), rows).to(visual.device)
        x = torch.cat([seen, read], 1)
        mask = None if present is None else F.pad(present, (tokens, 0), value=True)[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        out: Tensor = self.head(self.norm(x[:, :tokens]))[..., 0]
        return out


def _normal(x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:])


def waves(places: Tensor, width: int) -> Tensor:
    """Sines and cosines of `places` [n] (Vaswani et al. 2017, arXiv 1706.03762): float32 [n, width]."""
    rate = PERIOD ** -(torch.arange(width // 2) / (width // 2))
    angles = places[:, None] * rate
    return torch.cat([angles.sin(), angles.cos()], -1)


def grid(tokens: int, width: int) -> Tensor:
    """Places of a picture's tokens: row and column where they fill a square, their number otherwise. float32 [tokens, width]."""
    at = torch.arange(tokens)
    side = round(tokens**0.5)
    if side * side != tokens:
        return waves(at, width)
    return torch.cat([waves(at // side, width // 2), waves(at % side, width // 2)], -1)


class RouterFailed(ArithmeticError):
    """Scores that are not finite: nothing can be chosen by them."""


@torch.inference_mode()
def score(router: Router, model: Llava, images: Sequence[ImageFeatures], read: Sequence[int]) -> Tensor:
    """Scores [images, visual tokens] of a request's pictures for the tokens of its question. Raises RouterFailed."""
    words = model.embed(torch.tensor(read, dtype=torch.long, device=model.device))
    scores: Tensor = router(torch.cat([image.tokens for image in images]), words.expand(len(images), -1, -1))
    if not torch.isfinite(scores).all():
        raise RouterFailed("the router's scores are not finite")
    return scores


def save_router(router: Router, path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in router.state_dict().items()}, path, {"format": "pt"})


def load_router(checkpoint: Checkpoint) -> Router | None:
    """The checkpoint's router, on the model's device; None if it has none.

    Raises CheckpointError for a file that is missing or damaged, and for a router that was trained for another checkpoint.
    """
    record = checkpoint.manifest.router
    path = checkpoint.directory / FILE
    if record is None:
        return None
    if record.checkpoint != checkpoint.fingerprint:
        raise CheckpointError(
            f"{path} was trained for checkpoint {record.checkpoint} and this one is {checkpoint.fingerprint}: its scores foresee "
            "another model; run `espalier route`"
        )
    try:
        router = Router(Shape(**record.shape))
        router.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} does not load ({str(error).splitlines()[0]}); run `espalier route`") from error
    if router.shape.width != checkpoint.model.config.text_config.hidden_size:
        raise CheckpointError(f"{path} reads rows of {router.shape.width}, and the model's are others; run `espalier route`")
    return router.requires_grad_(False).eval().to(checkpoint.model.device)
