"""The CLIP vision tower: its features, and the class token's attention to each patch.

Only the layers up to the feature layer run. LLaVA-1.5 reads the output of the last layer but one, so the last layer, the final
norm and the pooling are never computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from models.attention import attend
from models.layer_shapes import layer_shapes
from models.linear import Linear, fuse
from models.vision.features import ImageFeatures, activate

ROW_MULTIPLE = 8
"""Rows are padded to a multiple of this: CPU products lose a fifth of their rate at row counts like 577."""


@dataclass
class EncoderLayer:
    norm1: tuple[Tensor, Tensor]
    qkv: Linear
    out: Linear
    norm2: tuple[Tensor, Tensor]
    up: Linear
    down: Linear


@dataclass
class ClipTower:
    config: LlavaConfig
    patch_embedding: Tensor  # [width, 3, patch, patch]
    class_embedding: Tensor  # [width]
    position_embedding: Tensor  # [1 + patches, width]
    pre_norm: tuple[Tensor, Tensor]
    layers: list[EncoderLayer]

    def __call__(self, pixels: Tensor) -> ImageFeatures:
        config, clip = self.config, self.config.vision_config
        images, width = len(pixels), clip.hidden_size
        patches = F.conv2d(pixels, self.patch_embedding, stride=clip.patch_size).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(images, 1, -1), patches], dim=1).add_(self.position_embedding)
        rows = tokens.shape[1]
        x = F.pad(tokens.view(-1, width), (0, 0, 0, -images * rows % ROW_MULTIPLE))
        x = F.layer_norm(x, (width,), *self.pre_norm, clip.layer_norm_eps)
        wanted, outputs = feature_layers(config), {}
        attention = torch.empty(0)
        for index, layer in enumerate(self.layers, 1):
            x, attention = self._layer(x, layer, images, rows, last=index == len(self.layers))
            if index in wanted:
                outputs[index] = x[: images * rows].view(images, rows, width)
        features = torch.cat([outputs[i] for i in wanted], dim=-1) if len(wanted) > 1 else outputs[wanted[0]]
        if config.vision_feature_select_strategy == "default":
            return ImageFeatures(features[:, 1:], attention)
        # "full" keeps the class token as a visual token, which must never be dropped.
        return ImageFeatures(features, F.pad(attention, (1, 0), value=1.0))

    def _layer(self, x: Tensor, layer: EncoderLayer, images: int, rows: int, *, last: bool) -> tuple[Tensor, Tensor]:
        """One layer on packed rows [images * rows + padding, width]; of the `last` one also the class token's attention."""
        clip = self.config.vision_config
        width = x.shape[-1]
        dim = width // clip.num_attention_heads
        qkv = layer.qkv(F.layer_norm(x, (width,), *layer.norm1, clip.layer_norm_eps))
        heads = qkv.shape[1] // (3 * dim)  # structured pruning may leave a layer fewer of them
        mixed = x.new_zeros(len(x), heads * dim)
        attention = []
        for image in range(images):
            here = slice(image * rows, (image + 1) * rows)
            query, key, value = qkv[here].view(rows, 3, heads, dim).unbind(1)
            keys, values = key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()
            mixed[here] = attend(query, keys, values, scale=dim**-0.5, causal=False).reshape(rows, -1)
            if last:
                attention.append(class_attention(query[0], keys))
        x = layer.out(mixed).add_(x)
        hidden = activate(layer.up(F.layer_norm(x, (width,), *layer.norm2, clip.layer_norm_eps)), clip.hidden_act)
        return layer.down(hidden).add_(x), torch.stack(attention) if last else torch.empty(0)

    def linears(self) -> dict[str, Linear]:
        return {f"{i}.{name}": getattr(layer, name) for i, layer in enumerate(self.layers) for name in ("qkv", "out", "up", "down")}


def visual_tokens(config: LlavaConfig) -> int:
    """Of one image."""
    clip = config.vision_config
    return int((clip.image_size // clip.patch_size) ** 2) + (config.vision_feature_select_strategy == "full")


def feature_layers(config: LlavaConfig) -> list[int]:
    """The layers whose output the projector reads, as counts of layers run (0 is the embedding)."""
    total = config.vision_config.num_hidden_layers + 1
    chosen = config.vision_feature_layer
    return [i % total for i in ([chosen] if isinstance(chosen, int) else chosen)]


def class_attention(query: Tensor, keys: Tensor) -> Tensor:
    """Attention of the class token, `query` [heads, dim], to every patch, mean over heads: [patches] in float32."""
    logits = (keys.float() @ query.float()[:, :, None])[:, :, 0] * query.shape[-1] ** -0.5
    return logits.softmax(-1).mean(0)[1:]


def check_supported(config: LlavaConfig) -> None:
    """Raise ValueError for layers or features that the tower does not have."""
    layer_shapes(config.vision_config)
    if config.vision_feature_select_strategy not in ("default", "full"):
        raise ValueError(f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} is not known")
    layers = config.vision_config.num_hidden_layers
    chosen = config.vision_feature_layer
    for layer in [chosen] if isinstance(chosen, int) else chosen:
        if layer == 0 or not -layers <= layer <= layers:
            raise ValueError(f"vision_feature_layer {layer} names no layer of a tower of {layers}")


def from_transformers(model: LlavaForConditionalGeneration) -> ClipTower:
    """Take the tower's weights out of a transformers model; layers above the feature layer are freed."""
    tower = model.model.vision_tower
    used = max(feature_layers(model.config))
    layers = [
        EncoderLayer(
            norm1=(layer.layer_norm1.weight.detach(), layer.layer_norm1.bias.detach()),
            qkv=fuse(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            out=fuse(layer.self_attn.out_proj),
            norm2=(layer.layer_norm2.weight.detach(), layer.layer_norm2.bias.detach()),
            up=fuse(layer.mlp.fc1),
            down=fuse(layer.mlp.fc2),
        )
        for layer in tower.encoder.layers[:used]
    ]
    del tower.encoder.layers[used:]
    embeddings = tower.embeddings
    return ClipTower(
        config=model.config,
        patch_embedding=embeddings.patch_embedding.weight.detach(),
        class_embedding=embeddings.class_embedding.detach(),
        position_embedding=embeddings.position_embedding.weight.detach(),
        pre_norm=(tower.pre_layrnorm.weight.detach(), tower.pre_layrnorm.bias.detach()),
        layers=layers,
    )
