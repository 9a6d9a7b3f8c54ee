"""Vision transformers as towers, CLIP and SigLIP: their features, and the class token's attention to each patch.

SigLIP has no class token, no norm before its layers and a bias in its patch embedding; the rest is the same. Only the layers up to
the feature layer run. LLaVA-1.5 reads the output of the last layer but one, so the last layer, the final norm and the pooling are
never computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from models.attention import attend
from models.layer_shapes import layer_shapes
from models.linear import Linear, fuse
from models.sparse import AnyLinear
from models.vision.features import ImageFeatures, activate

ROW_MULTIPLE = 8
"""Rows are padded to a multiple of this: CPU products lose a fifth of their rate at row counts like 577."""


@dataclass
class EncoderLayer:
    norm1: tuple[Tensor, Tensor]
    qkv: AnyLinear
    out: AnyLinear
    norm2: tuple[Tensor, Tensor]
    up: AnyLinear
    down: AnyLinear


@dataclass
class VisionTransformer:
    config: PreTrainedConfig
    patch_embedding: tuple[Tensor, Tensor | None]  # [width, 3, patch, patch] and its bias
    class_embedding: Tensor | None  # [width]
    position_embedding: Tensor  # [patches, and one more for the class token, width]
    pre_norm: tuple[Tensor, Tensor] | None
    layers: list[EncoderLayer]

    def __call__(self, pixels: Tensor) -> ImageFeatures:
        config, vit = self.config, self.config.vision_config
        images, width = len(pixels), vit.hidden_size
        tokens = F.conv2d(pixels, *self.patch_embedding, stride=vit.patch_size).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            tokens = torch.cat([self.class_embedding.expand(images, 1, -1), tokens], dim=1)
        tokens = tokens + self.position_embedding
        rows = tokens.shape[1]
        x = F.pad(tokens.reshape(-1, width), (0, 0, 0, -images * rows % ROW_MULTIPLE))
        if self.pre_norm is not None:
            x = F.layer_norm(x, (width,), *self.pre_norm, vit.layer_norm_eps)
        wanted, outputs = feature_layers(config), {}
        attention = torch.empty(0)
        for index, layer in enumerate(self.layers, 1):
            x, attention = self._layer(x, layer, images, rows, last=index == len(self.layers))
            if index in wanted:
                outputs[index] = x[: images * rows].view(images, rows, width)
        features = torch.cat([outputs[i] for i in wanted], dim=-1) if len(wanted) > 1 else outputs[wanted[0]]
        leaves_out_first = config.vision_feature_select_strategy == "default"
        if self.class_embedding is None:
            return ImageFeatures(features[:, int(leaves_out_first) :])
        if leaves_out_first:
            return ImageFeatures(features[:, 1:], attention)
        # "full" keeps the class token as a visual token, which must never be dropped.
        return ImageFeatures(features, F.pad(attention, (1, 0), value=1.0))

    def _layer(self, x: Tensor, layer: EncoderLayer, images: int, rows: int, *, last: bool) -> tuple[Tensor, Tensor]:
        """One layer on packed rows [images * rows + padding, width]; of the `last` one also the class token's attention,
        if there is one."""
        vit = self.config.vision_config
        width = x.shape[-1]
        dim = width // vit.num_attention_heads
        qkv = layer.qkv(F.layer_norm(x, (width,), *layer.norm1, vit.layer_norm_eps))
        heads = qkv.shape[1] // (3 * dim)  # structured pruning may leave a layer fewer of them
        mixed = x.new_zeros(len(x), heads * dim)
        attention = []
        for image in range(images):
            here = slice(image * rows, (image + 1) * rows)
            query, key, value = qkv[here].view(rows, 3, heads, dim).unbind(1)
            keys, values = key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()
            mixed[here] = attend(query, keys, values, scale=dim**-0.5, causal=False).reshape(rows, -1)
            if last and self.class_embedding is not None:
                attention.append(class_attention(query[0], keys))
        x = layer.out(mixed).add_(x)
        hidden = activate(layer.up(F.layer_norm(x, (width,), *layer.norm2, vit.layer_norm_eps)), vit.hidden_act)
        return layer.down(hidden).add_(x), torch.stack(attention) if attention else torch.empty(0)

    def linears(self) -> dict[str, AnyLinear]:
        return {f"{i}.{name}": getattr(layer, name) for i, layer in enumerate(self.layers) for name in ("qkv", "out", "up", "down")}


def visual_tokens(config: PreTrainedConfig) -> int:
    """Of one tile. "default" leaves out the first token, whether it is a class token or, in SigLIP, a patch."""
    vit = config.vision_config
    patches = int(vit.image_size // vit.patch_size) ** 2
    return patches + has_class_token(config) - (config.vision_feature_select_strategy == "default")


def has_class_token(config: PreTrainedConfig) -> bool:
    return bool(config.vision_config.model_type == "clip_vision_model")


def feature_layers(config: PreTrainedConfig) -> list[int]:
    """The layers whose output the projector reads, as counts of layers run (0 is the embedding)."""
    total = config.vision_config.num_hidden_layers + 1
    chosen = config.vision_feature_layer
    return [i % total for i in ([chosen] if isinstance(chosen, int) else chosen)]


def class_attention(query: Tensor, keys: Tensor) -> Tensor:
    """Attention of the class token, `query` [heads, dim], to every patch, mean over heads: [patches] in float32."""
    logits = (keys.float() @ query.float()[:, :, None])[:, :, 0] * query.shape[-1] ** -0.5
    return logits.softmax(-1).mean(0)[1:]


def check_supported(config: PreTrainedConfig) -> None:
    """Raise ValueError for layers or features that the tower does not have."""
    layer_shapes(config.vision_config)
    if config.vision_feature_select_strategy not in ("default", "full"):
        raise ValueError(f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} is not known")
    layers = config.vision_config.num_hidden_layers
    chosen = config.vision_feature_layer
    for layer in [chosen] if isinstance(chosen, int) else chosen:
        if layer == 0 or not -layers <= layer <= layers:
            raise ValueError(f"vision_feature_layer {layer} names no layer of a tower of {layers}")


def from_transformers(model: PreTrainedModel, hold: Callable[[Linear], AnyLinear]) -> VisionTransformer:
    """Take the tower's weights out of a transformers model; layers above the feature layer are freed. `hold` chooses the format of
    each matrix."""
    tower = model.model.vision_tower
    used = max(feature_layers(model.config))
    layers = [
        EncoderLayer(
            norm1=(layer.layer_norm1.weight.detach(), layer.layer_norm1.bias.detach()),
            qkv=hold(fuse(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
            out=hold(fuse(layer.self_attn.out_proj)),
            norm2=(layer.layer_norm2.weight.detach(), layer.layer_norm2.bias.detach()),
            up=hold(fuse(layer.mlp.fc1)),
            down=hold(fuse(layer.mlp.fc2)),
        )
        for layer in tower.encoder.layers[:used]
    ]
    del tower.encoder.layers[used:]
    embeddings, patch = tower.embeddings, tower.embeddings.patch_embedding
    return VisionTransformer(
        config=model.config,
        patch_embedding=(patch.weight.detach(), None if patch.bias is None else patch.bias.detach()),
        class_embedding=embeddings.class_embedding.detach() if has_class_token(model.config) else None,
        position_embedding=embeddings.position_embedding.weight.detach(),
        pre_norm=(tower.pre_layrnorm.weight.detach(), tower.pre_layrnorm.bias.detach()) if has_class_token(model.config) else None,
        layers=layers,
    )
