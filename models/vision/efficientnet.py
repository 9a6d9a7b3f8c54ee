"""A frozen EfficientNet-Lite as the eyes of a LLaVA: its feature maps, joined, become a sequence of visual tokens.

EfficientNet-Lite (Tan & Le 2019, arXiv:1905.11946; the Lite variants have neither squeeze-and-excitation nor swish) is a chain of
inverted bottlenecks. As in FastVLM (arXiv:2412.13303) the map at stride 32 and the one at stride 16, four of its places laid side
by side, are one token a place. The network knows things as large as they are in pictures of 224 pixels, so it looks again at the
whole picture made small, and spreads that map over the places.

What stands between the maps and LLaVA's projector is ours and trained: a linear layer, a learned 2-D position (row + column) and
ConvNeXt blocks (Liu et al. 2022, arXiv:2201.03545), which gather what belongs to one thing. Where the network was trained on too, a
`Tagger` beside it keeps what the published one knew. The modules are registered with
transformers' Auto classes: importing this module lets stock `LlavaForConditionalGeneration` load such a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, LlavaConfig, LlavaForConditionalGeneration, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from models import kernels
from models.linear import Linear
from models.mapped import give_back
from models.sparse import AnyLinear
from models.vision.convolution import NativeEfficientNet
from models.vision.features import ImageFeatures

LITE0 = (
    # kernel, stride, expansion, channels out
    (3, 1, 1, 16),
    (3, 2, 6, 24), (3, 1, 6, 24),
    (5, 2, 6, 40), (5, 1, 6, 40),
    (3, 2, 6, 80), (3, 1, 6, 80), (3, 1, 6, 80),
    (5, 1, 6, 112), (5, 1, 6, 112), (5, 1, 6, 112),
    (5, 2, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192),
    (3, 1, 6, 320),
)  # fmt: skip
"""The inverted bottlenecks of EfficientNet-Lite0."""
CLASSES = 1000
"""Classes of ImageNet, which the published networks tell apart."""
PART = 5
"""Places along a side that a tagger names together: 160 pixels of the small picture."""


class EfficientNetLiteConfig(PretrainedConfig):
    """`blocks` are (kernel, stride, expansion, channels out); `head` channels follow them, and a visual token has `hidden_size`.

    The picture is looked at with `image_size` pixels a side and with `wide_size`. `tags` is how many names its `Tagger` knows, 0
    without one.
    """

    model_type = "efficientnet_lite_tower"

    def __init__(
        self,
        image_size: int = 544,
        patch_size: int = 32,
        wide_size: int = 288,
        stem: int = 32,
        blocks: Any = LITE0,
        head: int = 1280,
        hidden_size: int = 512,
        neck_layers: int = 2,
        neck_kernel: int = 7,
        layer_norm_eps: float = 1e-5,
        tags: int = 0,
        **rest: Any,
    ) -> None:
        self.image_size, self.patch_size, self.wide_size = image_size, patch_size, wide_size
        self.stem, self.head = stem, head
        self.blocks = [list(block) for block in blocks]
        self.hidden_size = hidden_size
        self.neck_layers, self.neck_kernel = neck_layers, neck_kernel
        self.layer_norm_eps = layer_norm_eps
        self.tags = tags
        super().__init__(**rest)

    @property
    def num_hidden_layers(self) -> int:
        """One, whatever is inside: a single sequence comes out."""
        return 1


class Conv(nn.Conv2d):
    """A convolution with SAME padding; its batch norm is folded into weight and bias.

    With stride 2 and even sizes TensorFlow's SAME padding has one row and column more behind than before. A kernel with a row and a
    column of zeros before its own does the same, and no picture is copied into a wider one.
    """

    def __init__(self, width_in: int, width_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(width_in, width_out, kernel, stride, padding=kernel // 2, groups=groups)

    def forward(self, input: Tensor) -> Tensor:
        weight = F.pad(self.weight, (1, 0, 1, 0)) if self.stride[0] > 1 else self.weight
        return self._conv_forward(input, weight, self.bias)


class InvertedBottleneck(nn.Module):
    def __init__(self, width: int, kernel: int, stride: int, expansion: int, out: int) -> None:
        super().__init__()
        wide = width * expansion
        self.expand = Conv(width, wide) if expansion > 1 else None
        self.depthwise = Conv(wide, wide, kernel, stride, groups=wide)
        self.project = Conv(wide, out)
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu6(self.expand(x), inplace=True) if self.expand else x
        y = self.project(F.relu6(self.depthwise(wide), inplace=True))
        return x + y if self.residual else y


class EfficientNetLite(nn.Module):
    """Pixels [n, 3, size, size] to the maps at stride 16 [n, c, size/16, size/16] and 32 [n, c, size/32, size/32]."""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__()
        self.stem = Conv(3, config.stem, 3, 2)
        widths = [config.stem, *(block[-1] for block in config.blocks)]
        self.blocks = nn.ModuleList(
            InvertedBottleneck(width, *block) for width, block in zip(widths[:-1], config.blocks, strict=True)
        )
        self.head = Conv(widths[-1], config.head)
        self.last_stride = max(i for i, block in enumerate(config.blocks) if block[1] == 2)
        self.fine_width, self.coarse_width = widths[self.last_stride], widths[-1]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu6(self.stem(pixels), inplace=True)
        fine = x
        for index, block in enumerate(self.blocks):
            if index == self.last_stride:
                fine = x
            x = block(x)
        return fine, x


class NeckBlock(nn.Module):
    """ConvNeXt's block on a map laid out [n, height, width, channels]."""

    def __init__(self, width: int, kernel: int, eps: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.down(F.gelu(self.up(self.norm(y))))


class Neck(nn.Module):
    """Both maps to a sequence [n, (size/32)², hidden_size]."""

    def __init__(self, config: EfficientNetLiteConfig, width_in: int) -> None:
        super().__init__()
        side = config.image_size // config.patch_size
        self.norm_in = nn.LayerNorm(width_in, config.layer_norm_eps)
        self.linear = nn.Linear(width_in, config.hidden_size)
        self.row = nn.Parameter(torch.zeros(side, config.hidden_size))
        self.column = nn.Parameter(torch.zeros(side, config.hidden_size))
        self.layers = nn.ModuleList(
            NeckBlock(config.hidden_size, config.neck_kernel, config.layer_norm_eps) for _ in range(config.neck_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, joined: Tensor) -> Tensor:
        """`joined` [n, side, side, width_in]."""
        x = self.linear(self.norm_in(joined)) + self.row[:, None] + self.column
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).flatten(1, 2)


class Tagger(nn.Module):
    """Names what a classifier of photographs sees in each part of the small picture, and says the names to the visual tokens there.

    The tower's own network learns from drawings and forgets photographs meanwhile; the tagger's stays as it was published. What it
    tells are probabilities of names: what they mean to the language model can be learned without photographs. Ours; tags beside a
    picture help to describe it in Tag2Text too (Huang et al. 2023, arXiv:2303.05657).
    """

    groups: Tensor
    """Which classes are called by which name: ones and zeros [tags, CLASSES]. Some are called by none."""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__()
        self.net = EfficientNetLite(config)
        self.classes = nn.Linear(config.head, CLASSES)
        self.register_buffer("groups", torch.eye(config.tags, CLASSES))
        self.words = nn.Linear(config.tags, config.hidden_size, bias=False)

    def tags(self, coarse: Tensor) -> Tensor:
        """The network's map at stride 32 [n, side, side, width] to probabilities of names [n, side, side, tags]."""
        seen = F.relu6(F.linear(coarse, self.net.head.weight.flatten(1), self.net.head.bias)).permute(0, 3, 1, 2)
        parts = F.avg_pool2d(seen, PART, 1, PART // 2, count_include_pad=False).permute(0, 2, 3, 1)
        return F.linear(self.classes(parts).float().softmax(-1).to(coarse.dtype), self.groups)

    def forward(self, tags: Tensor, side: int) -> Tensor:
        """Tags [n, s, s, tags] to what is added to the visual tokens [n, side², hidden_size]."""
        return spread(self.words(tags), side).flatten(1, 2)


@dataclass
class Maps:
    """What the networks saw, each [n, side, side, width]: four places of stride 16 laid side by side; stride 32; and stride 32 of
    the whole picture made small, which has fewer places. `tags` are of the small picture too; None without a tagger."""

    fine: Tensor
    coarse: Tensor
    wide: Tensor
    tags: Tensor | None = None


def spread(x: Tensor, side: int) -> Tensor:
    """A map [n, s, s, width] over more places [n, side, side, width]."""
    return F.interpolate(x.permute(0, 3, 1, 2), size=(side, side), mode="bilinear", align_corners=True).permute(0, 2, 3, 1)


def joined_width(config: EfficientNetLiteConfig) -> int:
    """Channels that `join` gives."""
    last = max(i for i, block in enumerate(config.blocks) if block[1] == 2)
    return 2 * config.head + 4 * int(config.blocks[last - 1][-1])


def join(maps: Maps, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The maps as one [n, side, side, channels]; `weight` and `bias` are the network's last layer."""
    coarse, wide = (F.relu6(F.linear(seen, weight, bias)) for seen in (maps.coarse, maps.wide))
    return torch.cat([maps.fine, coarse, spread(wide, coarse.shape[1])], dim=-1)


class EfficientNetLiteTower(PreTrainedModel):
    """What LLaVA asks of a vision tower: `hidden_states`, of which the last is the sequence of visual tokens."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    base_model_prefix = "tower"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.net = EfficientNetLite(config)
        self.neck = Neck(config, joined_width(config))
        self.tagger = Tagger(config) if config.tags else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def small(self, pixel_values: Tensor) -> Tensor:
        """The whole picture made small, in float32."""
        return F.interpolate(pixel_values.float(), size=(self.config.wide_size,) * 2, mode="bilinear", antialias=True)

    def maps(self, pixel_values: Tensor) -> Maps:
        fine, coarse = self.net(pixel_values.contiguous(memory_format=torch.channels_last))
        small = self.small(pixel_values).to(pixel_values.dtype).contiguous(memory_format=torch.channels_last)
        _, wide = self.net(small)
        tags = self.tagger.tags(self.tagger.net(small)[1].permute(0, 2, 3, 1)) if self.tagger else None
        return Maps(F.pixel_unshuffle(fine, 2).permute(0, 2, 3, 1), coarse.permute(0, 2, 3, 1), wide.permute(0, 2, 3, 1), tags)

    def tokens(self, maps: Maps) -> Tensor:
        hidden = self.neck(join(maps, self.net.head.weight.flatten(1), self.net.head.bias))
        if self.tagger is None or maps.tags is None:
            return hidden
        return hidden + self.tagger(maps.tags, maps.coarse.shape[1])

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        hidden = self.tokens(self.maps(pixel_values.to(self.dtype)))
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden,))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteTower)


@dataclass
class EfficientNetTower:
    """The tower as our forward calls it. There is no class token, so `attention` is empty: [images, 0].

    Where `native` runs the network, and `tagging` the tagger's, the convolutions are gone from the module.
    """

    module: EfficientNetLiteTower
    native: NativeEfficientNet | None = None
    tagging: NativeEfficientNet | None = None

    @property
    def merge_layer(self) -> None:
        """There are no patches to merge."""

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, patch_ratio: float = 1.0) -> ImageFeatures:
        if patch_ratio < 1:
            raise ValueError("a convolutional tower has no patches to merge")
        maps = self.module.maps(pixels) if self.native is None else self._maps(self.native, pixels)
        return ImageFeatures(self.module.tokens(maps).to(pixels.dtype), pixels.new_zeros(len(pixels), 0))

    def _maps(self, native: NativeEfficientNet, pixels: Tensor) -> Maps:
        """As the module's."""
        small = [*self.module.small(pixels)]
        seen = native([*pixels, *small])
        fine, coarse = (torch.stack(maps).to(self.module.dtype) for maps in zip(*seen[: len(pixels)], strict=True))
        wide = self._coarse(seen[len(pixels) :])
        tagger = self.module.tagger
        tags = tagger.tags(self._coarse(self.tagging(small))) if tagger and self.tagging else None
        return Maps(F.pixel_unshuffle(fine.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1), coarse, wide, tags)

    def _coarse(self, seen: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([coarse for _, coarse in seen]).to(self.module.dtype)

    def linears(self) -> dict[str, AnyLinear]:
        """None that pruning may touch: nearly all of the network is convolutions."""
        return {}

    @property
    def other_bytes(self) -> int:
        native = [tensor for network in (self.native, self.tagging) if network for tensor in network.held]
        return sum(tensor.nbytes for tensor in (*self.module.parameters(), *native))


def visual_tokens(config: LlavaConfig) -> int:
    """Of one image."""
    return int((config.vision_config.image_size // config.vision_config.patch_size) ** 2)


def check_supported(config: LlavaConfig) -> None:
    """Raise ValueError for features that the tower does not have."""
    if config.vision_feature_select_strategy != "full":
        raise ValueError("vision_feature_select_strategy must be 'full': this tower has no class token to leave out")
    if config.vision_feature_layer not in (-1, 0):
        raise ValueError(f"vision_feature_layer {config.vision_feature_layer} names no layer of a tower of one")


def from_transformers(model: LlavaForConditionalGeneration, hold: Callable[[Linear], AnyLinear]) -> EfficientNetTower:
    """Take the tower out of a transformers model. It has no matrices to `hold`."""
    tower = model.model.vision_tower.eval()
    nets = [tower.net, tower.tagger.net] if tower.tagger else [tower.net]
    natives = [NativeEfficientNet.of(net) for net in nets]
    if natives[0]:
        for net in nets:
            give_back([*net.stem.parameters(), *net.blocks.parameters()])
            net.stem = net.blocks = None
        if kernels.many_rows() == "float32":
            tower.float()  # the neck too: 289 rows are multiplied faster
        return EfficientNetTower(tower, *natives)
    return EfficientNetTower(tower.to(memory_format=torch.channels_last))


def fold(weights: dict[str, Tensor], eps: float = 1e-3) -> dict[str, Tensor]:
    """The published weights of EfficientNet-Lite (`_conv_stem` and the like) under our names, their batch norms folded in."""
    pairs = {"_conv_stem": ("stem", "_bn0"), "_conv_head": ("head", "_bn1")}
    blocks = {int(name.split(".")[1]) for name in weights if name.startswith("_blocks.")}
    for i in blocks:
        at = f"_blocks.{i}."
        pairs[f"{at}_expand_conv"] = (f"blocks.{i}.expand", f"{at}_bn0")
        pairs[f"{at}_depthwise_conv"] = (f"blocks.{i}.depthwise", f"{at}_bn1")
        pairs[f"{at}_project_conv"] = (f"blocks.{i}.project", f"{at}_bn2")
    folded = {}
    for conv, (name, norm) in pairs.items():
        if f"{conv}.weight" not in weights:
            continue
        gain = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + eps).sqrt()
        folded[f"{name}.weight"] = weights[f"{conv}.weight"] * gain[:, None, None, None]
        folded[f"{name}.bias"] = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * gain
    return folded
