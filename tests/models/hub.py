"""Tiny checkpoints in the format of the hub's repositories: key names, processor files, chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from models.random_llava import random_model, tiny_config
from tests.server.tiny import processor

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PIXELS = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255, "resample": 3,
    "image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
CLIP_SIZE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
SIGLIP_SIZE = {"size": {"height": 32, "width": 32}}


def hub_config(family: str, text: str = "qwen2", tower: str | None = None) -> Any:
    """A configuration for the vocabulary of the embedded world's tokenizer."""
    tokenizer = processor().tokenizer
    config = tiny_config(text, family=family, tower=tower or ("siglip" if family == "llava_onevision" else "clip"))
    part = config.text_config
    part.vocab_size, part.eos_token_id, part.pad_token_id = len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id
    part.initializer_range = 0.2
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    return config


def write_hub(directory: Path, config: Any, **options: Any) -> Path:
    """A whole checkpoint with random weights; `options` go to transformers' save_pretrained."""
    model = random_model(config, seed=7)
    model.generation_config.eos_token_id = processor().tokenizer.eos_token_id
    model.save_pretrained(directory, **options)
    for shard in directory.glob("*.safetensors"):
        save_file({_hub_name(name): tensor for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.exists():
        document = json.loads(index.read_text())
        document["weight_map"] = {_hub_name(name): shard for name, shard in document["weight_map"].items()}
        index.write_text(json.dumps(document))
    processor().tokenizer.save_pretrained(directory)
    siglip = config.vision_config.model_type == "siglip_vision_model"
    pixels = PIXELS | (SIGLIP_SIZE if siglip and config.model_type != "llava_next" else CLIP_SIZE)
    own = {"image_token": "<image>", "vision_feature_select_strategy": config.vision_feature_select_strategy}
    if config.model_type == "llava":
        pixels |= {"image_processor_type": "SiglipImageProcessor" if siglip else "CLIPImageProcessor"}
        own |= {"patch_size": 8, "num_additional_image_tokens": int(not siglip), "processor_class": "LlavaProcessor"}
    elif config.model_type == "llava_next":
        pixels |= {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": config.image_grid_pinpoints}
        own |= {"patch_size": 8, "num_additional_image_tokens": int(not siglip), "processor_class": "LlavaNextProcessor"}
    else:
        pixels |= {"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": config.image_grid_pinpoints}
        own |= {"num_image_tokens": 16, "video_token": "<video>", "processor_class": "LlavaOnevisionProcessor"}
    _write(directory / "preprocessor_config.json", pixels)
    _write(directory / "processor_config.json", own)
    _write(directory / "chat_template.json", {"chat_template": VICUNA if config.model_type == "llava_next" else CHATML})
    return directory


def _hub_name(name: str) -> str:
    """Newer transformers write the tower without the level that the hub's repositories have, and read both."""
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document))
