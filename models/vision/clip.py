"""The CLIP vision tower and the projector: pixels to visual tokens, and how much the class token looks at each.

Only the layers below the feature layer run: LLaVA-1.5 reads the output of the last layer but one, and its last layer,
the final norm and the pooling are never computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaConfig
from transformers.activations import ACT2FN

from models.attention import attend
from models.linear import Linear
from models.ops import quick_gelu

ALIGN = 8
"""Rows of the vision tower are a multiple of this."""
TOGETHER = 2
"""Images that a CPU encodes at once: four to sixteen of them took up to 1.25 times as long each, one 1.05 times."""


@dataclass
class EncoderLayer:
    norm1: tuple[Tensor, Tensor]
    qkv: Linear
    out: Linear
    norm2: tuple[Tensor, Tensor]
    up: Linear
    down: Linear


@dataclass
class ImageFeatures:
    """`tokens` [images, visual_tokens, width of the text model]; `attention` [images, visual_tokens], rows sum to at most 1."""

    tokens: Tensor
    attention: Tensor


@dataclass
class VisionTower:
    config: LlavaConfig
    patch_embedding: Tensor  # [width, 3, patch, patch]
    class_embedding: Tensor  # [width]
    position_embedding: Tensor  # [1 + patches, width]
    pre_norm: tuple[Tensor, Tensor]
    layers: list[EncoderLayer]
    projector: tuple[Linear, Linear]

    def __call__(self, pixels: Tensor) -> ImageFeatures:
        """Encode `pixels` [images, 3, height, width], normalised, in the model's dtype."""
        if pixels.device.type == "cpu" and len(pixels) > TOGETHER:
            found = [self(part) for part in pixels.split(TOGETHER)]
            return ImageFeatures(torch.cat([one.tokens for one in found]), torch.cat([one.attention for one in found]))
        config, clip = self.config, self.config.vision_config
        images, width = len(pixels), clip.hidden_size
        patches = F.conv2d(pixels, self.patch_embedding, stride=clip.patch_size).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(images, 1, -1), patches], dim=1).add_(self.position_embedding)
        rows = tokens.shape[1]
        # CPU matrix products lose a fifth of their rate at row counts like 577; up to seven spare rows win it back.
        x = F.pad(tokens.view(-1, width), (0, 0, 0, -images * rows % ALIGN))
        x = F.layer_norm(x, (width,), *self.pre_norm, clip.layer_norm_eps)
        wanted = feature_layers(config)
        taken: dict[int, Tensor] = {}
        attention = torch.empty(0)
        for index, layer in enumerate(self.layers, 1):
            x, attention = self._layer(x, layer, images, rows, last=index == len(self.layers))
            if index in wanted:
                taken[index] = x[: images * rows].view(images, rows, width)
        features = torch.cat([taken[i] for i in wanted], dim=-1) if len(wanted) > 1 else taken[wanted[0]]
        if config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        else:  # "full" keeps the class token as a visual token; it must never be dropped
            attention = F.pad(attention, (1, 0), value=1.0)
        first, second = self.projector
        return ImageFeatures(second(activate(first(features), config.projector_hidden_act)), attention)

    def _layer(self, x: Tensor, layer: EncoderLayer, images: int, rows: int, *, last: bool) -> tuple[Tensor, Tensor]:
        """One layer on packed rows [images * rows + spare, width]; with the class token's attention [images, patches] if `last`."""
        clip = self.config.vision_config
        width = x.shape[-1]
        dim = width // clip.num_attention_heads
        qkv = layer.qkv(F.layer_norm(x, (width,), *layer.norm1, clip.layer_norm_eps))
        heads = qkv.shape[1] // (3 * dim)  # structured pruning may leave a layer fewer of them
        mixed = x.new_zeros(len(x), heads * dim)
        looks = []
        for image in range(images):
            here = slice(image * rows, (image + 1) * rows)
            query, key, value = qkv[here].view(rows, 3, heads, dim).unbind(1)
            keys, values = key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()
            mixed[here] = attend(query, keys, values, scale=dim**-0.5, causal=False).reshape(rows, -1)
            if last:
                looks.append(class_attention(query[0], keys))
        x = layer.out(mixed).add_(x)
        hidden = activate(layer.up(F.layer_norm(x, (width,), *layer.norm2, clip.layer_norm_eps)), clip.hidden_act)
        return layer.down(hidden).add_(x), torch.stack(looks) if last else torch.empty(0)


def feature_layers(config: LlavaConfig) -> list[int]:
    """The layers whose output the projector reads, as counts of layers run (0 is the embedding)."""
    total = config.vision_config.num_hidden_layers + 1
    chosen = config.vision_feature_layer
    return [i % total for i in ([chosen] if isinstance(chosen, int) else chosen)]


def class_attention(query: Tensor, keys: Tensor) -> Tensor:
    """Attention of the class token, `query` [heads, dim], to every patch, mean over heads: [patches] in float32."""
    logits = (keys.float() @ query.float()[:, :, None])[:, :, 0] * query.shape[-1] ** -0.5
    return logits.softmax(-1).mean(0)[1:]


def activate(x: Tensor, name: str) -> Tensor:
    if name == "quick_gelu":
        return quick_gelu(x)
    activation: Callable[[Tensor], Tensor] = ACT2FN[name]
    return activation(x)
