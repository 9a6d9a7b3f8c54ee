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

from models.attention import attend_images
from models.layer_shapes import layer_shapes
from models.linear import Linear, fuse
from models.sparse import AnyLinear
from models.vision.features import ImageFeatures, activate
from models.vision.patch_merging import MergedRows

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

    @property
    def merge_layer(self) -> int:
        """The middle one, behind whose attention patches are merged: `embedded` loses half a point there, 3.5 a layer earlier."""
        return (len(self.layers) + 1) // 2

    def __call__(self, pixels: Tensor, patch_ratio: float = 1.0) -> ImageFeatures:
        """Behind `merge_layer` rows stand for `patch_ratio` of the patches; their outputs are given to all places that they stand
        for."""
        config, vit = self.config, self.config.vision_config
        tokens = self._embed(pixels)
        images, rows, width = tokens.shape
        first = int(self.class_embedding is not None)
        keep = first + max(1, round((rows - first) * patch_ratio))
        x = _pack(tokens)
        if self.pre_norm is not None:
            x = F.layer_norm(x, (width,), *self.pre_norm, vit.layer_norm_eps)
        wanted, outputs = feature_layers(config), {}
        attention, merged = torch.empty(0), None
        for index, layer in enumerate(self.layers, 1):
            x, keys, attention = self._attend(x, layer, images, rows, merged, last=index == len(self.layers))
            if index == self.merge_layer and keep < rows:
                merged = MergedRows.of(keys.float().mean(2), keep, first)
                x, rows = _pack(merged.means(x[: images * rows].view(images, rows, width))), keep
            x = self._mlp(x, layer)
            if index in wanted:
                output = x[: images * rows].view(images, rows, width)
                outputs[index] = merged.unmerge(output) if merged else output
        features = torch.cat([outputs[i] for i in wanted], dim=-1) if len(wanted) > 1 else outputs[wanted[0]]
        leaves_out_first = config.vision_feature_select_strategy == "default"
        if self.class_embedding is None:
            return ImageFeatures(features[:, int(leaves_out_first) :])
        if leaves_out_first:
            return ImageFeatures(features[:, 1:], attention)
        # "full" keeps the class token as a visual token, the likeliest of all where tokens are chosen by its attention.
        return ImageFeatures(features, F.pad(attention, (1, 0), value=1.0))

    def _embed(self, pixels: Tensor) -> Tensor:
        """Patches, behind the class token if there is one, with their positions: [images, rows, width]."""
        patches = F.conv2d(pixels, *self.patch_embedding, stride=self.config.vision_config.patch_size).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            patches = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        return patches + self.position_embedding

    def _attend(
        self, x: Tensor, layer: EncoderLayer, images: int, rows: int, merged: MergedRows | None, *, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's attention on packed rows [images * rows + padding, width], its keys [images, rows, heads, dim], and of the
        `last` layer the class token's attention to each patch, if there is one. A row that stands for n places has log n added to
        its scores (ToMe's proportional attention)."""
        vit = self.config.vision_config
        width = x.shape[-1]
        dim = width // vit.num_attention_heads
        qkv = layer.qkv(F.layer_norm(x, (width,), *layer.norm1, vit.layer_norm_eps))
        heads = qkv.shape[1] // (3 * dim)  # structured pruning may leave a layer fewer of them
        query, keys, values = qkv[: images * rows].view(images, rows, 3, heads, dim).unbind(2)
        sizes = merged.sizes if merged else None
        bias = None if sizes is None else sizes.log().to(x.dtype)
        mixed = _pack(attend_images(query, keys, values, scale=dim**-0.5, bias=bias).flatten(2))
        if not last or self.class_embedding is None:
            return layer.out(mixed).add_(x), keys, torch.empty(0)
        seen = class_attention(query[:, 0], keys, sizes)[..., None]
        return layer.out(mixed).add_(x), keys, (merged.unmerge(seen) if merged else seen)[:, 1:, 0]

    def _mlp(self, x: Tensor, layer: EncoderLayer) -> Tensor:
        vit = self.config.vision_config
        hidden = activate(layer.up(F.layer_norm(x, (x.shape[-1],), *layer.norm2, vit.layer_norm_eps)), vit.hidden_act)
        return layer.down(hidden).add_(x)

    def linears(self) -> dict[str, AnyLinear]:
        return {f"{i}.{name}": getattr(layer, name) for i, layer in enumerate(self.layers) for name in ("qkv", "out", "up", "down")}

    @property
    def other_bytes(self) -> int:
        norms = [tensor for layer in self.layers for tensor in (*layer.norm1, *layer.norm2)]
        embeddings = (*self.patch_embedding, self.class_embedding, self.position_embedding, *(self.pre_norm or ()))
        return sum(tensor.nbytes for tensor in (*embeddings, *norms) if tensor is not None)


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


def _pack(tokens: Tensor) -> Tensor:
    """Tokens [images, rows, width] as [images * rows + padding, width]."""
    x = tokens.flatten(0, 1)
    return F.pad(x, (0, 0, 0, -len(x) % ROW_MULTIPLE))


def class_attention(query: Tensor, keys: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Attention of the class token, `query` [images, heads, dim], to every row of `keys` [images, rows, heads, dim], itself first,
    mean over heads: [images, rows] in float32. Where rows stand for `sizes` [images, rows] places, to each of a row's places."""
    logits = torch.einsum("ihd,irhd->ihr", query.float(), keys.float()) * query.shape[-1] ** -0.5
    if sizes is None:
        return logits.softmax(-1).mean(1)
    return (logits + sizes.log()[:, None]).softmax(-1).mean(1) / sizes


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
