"""LLaVA's original directories (`liuhaotian/llava-v1.5-7b` and their like) to the format of the hub's `llava-hf` repositories.

The language model and the projector are in the directory; the vision tower is named by its hub id and given as a second directory.
Only safetensors are read. What is written runs anywhere that transformers does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from models.checkpoint import INDEX, sha256, weight_files
from models.errors import CheckpointError
from models.families import FAMILIES
from models.manifest import Manifest, write_manifest
from models.saving import save_tensors

ROWS = 64
"""A vocabulary that grows by the image token is filled up to a multiple of this, as the hub's are."""
TEXT_MODELS = {"LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral", "LlavaQwenForCausalLM": "qwen2"}
"""The text model of each original architecture."""
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""The vision part of each model that a tower's directory may hold."""
TOWER_PARTS = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
TEXT_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings", "vocab_size", "bos_token_id", "eos_token_id",
    "pad_token_id", "tie_word_embeddings", "sliding_window", "use_sliding_window", "max_window_layers", "attention_bias",
    "initializer_range",
)  # fmt: skip
"""What an original configuration says of its text model, by transformers' own names."""
RENAMED = (
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.layers.", "language_model.model.layers."),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
)
CONTENT = r"""
{%- macro content(message) -%}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
"""A turn's pictures, and then its text."""
CHATML = r"""
{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif -%}
{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' + content(message) + '<|im_end|>\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
LLAMA3 = r"""
{%- if messages[0]['role'] != 'system' -%}
{{ '<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant.<|eot_id|>' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + content(message) + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}
"""
MISTRAL = r"""
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{ ' ' + content(message) + eos_token }}
{%- else -%}{{ '[INST] ' + content(message) + ' [/INST]' }}{%- endif -%}
{%- endfor -%}
"""
VICUNA = r"""
{%- if messages[0]['role'] != 'system' -%}
{{ 'A chat between a curious user and an artificial intelligence assistant. ' }}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'USER: ' + content(message) + ' ' }}
{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' + content(message) + eos_token }}
{%- else -%}{{ content(message) + ' ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


@dataclass(frozen=True)
class Original:
    """An original directory: its configuration, weight files and tokenizer, the image token among its tokens."""

    directory: Path
    config: dict[str, Any]
    shards: list[Path]
    tokenizer: PreTrainedTokenizerBase

    @property
    def text_model(self) -> str:
        return TEXT_MODELS[self.config["architectures"][0]]

    @property
    def family(self) -> str:
        """Tiles are what `image_aspect_ratio` says: `anyres` in NeXT, `anyres_max_9` in OneVision."""
        ratio = str(self.config.get("image_aspect_ratio"))
        if ratio.startswith("anyres_max_"):
            return "llava_onevision"
        return "llava_next" if ratio == "anyres" else "llava"

    @property
    def rows(self) -> int:
        """Of the embedding, once there is one for the image token."""
        known, needed = int(self.config["vocab_size"]), len(self.tokenizer)
        return known if needed <= known else -(-needed // ROWS) * ROWS


def convert(source: Path, tower: Path | None, out: Path, progress: Callable[[str], None] = lambda _: None) -> None:
    """Write the checkpoint `out`; it appears when it is whole. One file is in memory at a time.

    Raises CheckpointError, naming what is missing or not understood, before anything is written, and FileExistsError where `out`
    exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; name a directory that does not, or remove it")
    original = _read(source)
    seen = _read_tower(original, tower)
    config = _config(original, seen)
    names = _check_names(original)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _write_processor(original, seen, config, part)
        _write_json(part / "config.json", config)
        ends = {key: original.config[key] for key in ("bos_token_id", "eos_token_id") if original.config.get(key) is not None}
        _write_json(part / "generation_config.json", ends)
        files = _write_weights(original, seen, names, part, progress)
        write_manifest(part, Manifest(base_model=original.config.get("_name_or_path") or source.resolve().name, files=files))
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ---- reading


def _read(source: Path) -> Original:
    config = _read_json(source / "config.json")
    (architecture, *_) = config.get("architectures") or ["none"]
    if architecture not in TEXT_MODELS:
        raise CheckpointError(f"{source / 'config.json'}: architecture {architecture} is not one of {', '.join(TEXT_MODELS)}")
    if (projector := config.get("mm_projector_type", "linear")) != "mlp2x_gelu":
        raise CheckpointError(f"{source / 'config.json'}: mm_projector_type {projector!r} is not supported; mlp2x_gelu is")
    if config.get("mm_use_im_start_end"):
        raise CheckpointError(f"{source / 'config.json'}: mm_use_im_start_end puts tokens around pictures and is not supported")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # whatever transformers' parsers raise
        raise CheckpointError(f"{source}: the tokenizer does not load: {' '.join(str(error).split())[:200]}") from error
    if tokenizer.convert_tokens_to_ids("<image>") in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return Original(source, config, weight_files(source), tokenizer)


@dataclass(frozen=True)
class Tower:
    """A vision tower's directory: the configuration of its vision part, that of its pictures, and weight files."""

    directory: Path
    config: dict[str, Any]
    pixels: dict[str, Any]
    shards: list[Path]

    @property
    def is_siglip(self) -> bool:
        return bool(self.config["model_type"] == "siglip_vision_model")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Those of the vision part but for its pooling, by the hub's names."""
        for shard in self.shards:
            with safe_open(shard, "pt") as file:
                for key in file.keys():
                    name = key.removeprefix("vision_model.")
                    if name.startswith(TOWER_PARTS) and "position_ids" not in name:
                        yield f"vision_tower.vision_model.{name}", file.get_tensor(key)


def _read_tower(original: Original, directory: Path | None) -> Tower:
    hub_id = original.config.get("mm_vision_tower") or original.config.get("vision_tower")
    if directory is None or not (directory / "config.json").exists():
        raise CheckpointError(
            f"{original.directory} needs its vision tower, {hub_id}: name a directory that holds it with --tower"
        )
    config = _read_json(directory / "config.json")
    vision = config.get("vision_config", config)
    found = config.get("model_type", "")
    if (kind := TOWERS.get(found, found)) not in TOWERS.values():
        raise CheckpointError(f"{directory / 'config.json'}: model type {kind!r} is not supported as a tower; CLIP and SigLIP are")
    vision = {key: value for key, value in vision.items() if key not in ("_name_or_path", "architectures", "torch_dtype", "dtype")}
    vision["model_type"] = kind
    if kind == "siglip_vision_model":
        vision["vision_use_head"] = False
    width, read = vision.get("hidden_size"), original.config.get("mm_hidden_size")
    if None not in (width, read) and width != read:
        raise CheckpointError(f"{directory} is {width} wide and the projector reads {read}: it is not {hub_id}")
    pixels = _read_json(directory / "preprocessor_config.json")
    return Tower(directory, vision, pixels, weight_files(directory))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return document


def _check_names(original: Original) -> dict[str, str]:
    """The new name of each tensor. Raises CheckpointError for one that is neither in the original nor in a known place."""
    names = {}
    for shard in original.shards:
        with safe_open(shard, "pt") as file:
            for key in file.keys():
                names[key] = _renamed(key, shard)
    for wanted in ("multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.weight"):
        if wanted not in names.values():
            raise CheckpointError(f"{original.directory}: no file holds model.mm_projector; these weights are another model's")
    return names


def _renamed(key: str, shard: Path) -> str:
    for old, new in RENAMED:
        if key.startswith(old):
            return new + key.removeprefix(old)
    raise CheckpointError(f"{shard}: {key} is no tensor of an original LLaVA; its key names may be half converted")


# ---- writing


def _config(original: Original, tower: Tower) -> dict[str, Any]:
    """`config.json` as the hub's repositories have it."""
    given, family = original.config, original.family
    text = {key: given[key] for key in TEXT_KEYS if given.get(key) is not None}
    text |= {"model_type": original.text_model, "vocab_size": original.rows}
    # SigLIP has no class token to leave out.
    strategy = "full" if tower.is_siglip or given.get("mm_vision_select_feature") == "cls_patch" else "default"
    config = {
        "architectures": [FAMILIES[family].model.__name__], "model_type": family,
        "text_config": text, "vision_config": tower.config,
        "image_token_index": original.tokenizer.convert_tokens_to_ids("<image>"), "projector_hidden_act": "gelu",
        "vision_feature_layer": given.get("mm_vision_select_layer", -2), "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": bool(given.get("tie_word_embeddings")), "torch_dtype": given.get("torch_dtype", "float16"),
    }  # fmt: skip
    if FAMILIES[family].tiled:
        config["image_grid_pinpoints"] = [grid[::-1] for grid in _grids(original, tower)]  # theirs are width and height
    if FAMILIES[family].pooled:
        config["vision_aspect_ratio"] = given["image_aspect_ratio"]
    return config


def _grids(original: Original, tower: Tower) -> list[list[int]]:
    """Widths and heights: a list, or a range of tiles such as `(1x1),...,(6x6)`."""
    given: Any = original.config.get("image_grid_pinpoints")
    where = original.directory / "config.json"
    if isinstance(given, str) and given.startswith("("):
        size = tower.config["image_size"]
        first, last = ([int(side) for side in part.strip("()").split("x")] for part in (given.split(",")[0], given.split(",")[-1]))
        return [[x * size, y * size] for x in range(first[0], last[0] + 1) for y in range(first[1], last[1] + 1)]
    try:
        return [list(map(int, grid)) for grid in (json.loads(given) if isinstance(given, str) else given)]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: image_grid_pinpoints {given!r} is no list of sizes") from error


def _write_processor(original: Original, tower: Tower, config: dict[str, Any], out: Path) -> None:
    original.tokenizer.chat_template = None
    original.tokenizer.save_pretrained(out)
    (out / "chat_template.jinja").write_text(chat_template(original))
    size = tower.config["image_size"]
    pixels = {key: value for key, value in tower.pixels.items() if not key.endswith(("_type", "_class"))}
    own = {"image_token": "<image>", "vision_feature_select_strategy": config["vision_feature_select_strategy"]}
    if config["model_type"] == "llava":
        kind, processor = "LlavaImageProcessor", "LlavaProcessor"
        pixels["do_pad"] = original.config.get("image_aspect_ratio") == "pad"  # to a square, in the mean colour
        if tower.is_siglip:
            pixels |= {"do_center_crop": False, "crop_size": {"height": size, "width": size}}
    else:
        kind = {"llava_next": "LlavaNextImageProcessor", "llava_onevision": "LlavaOnevisionImageProcessor"}[config["model_type"]]
        processor = kind.replace("Image", "")
        pixels |= {"image_grid_pinpoints": config["image_grid_pinpoints"], "do_pad": True}
    if config["model_type"] == "llava_onevision":
        own |= {"num_image_tokens": (size // tower.config["patch_size"]) ** 2, "vision_aspect_ratio": config["vision_aspect_ratio"]}
    else:
        own |= {"patch_size": tower.config["patch_size"], "num_additional_image_tokens": int(not tower.is_siglip)}
    _write_json(out / "preprocessor_config.json", pixels | {"image_processor_type": kind, "processor_class": processor})
    _write_json(out / "processor_config.json", own | {"processor_class": processor})


def chat_template(original: Original) -> str:
    """The conversation that the text model was trained on, in transformers' format.

    LLaMA-3 and ChatML are told by their tokens; else there are Mistral's instructions, and Vicuna's two voices.
    """
    tokens = original.tokenizer.get_vocab()
    if "<|start_header_id|>" in tokens:
        return (CONTENT + LLAMA3).strip()
    if "<|im_start|>" in tokens:
        return (CONTENT + CHATML).strip()
    return (CONTENT + (MISTRAL if original.text_model == "mistral" else VICUNA)).strip()


def _write_weights(
    original: Original, tower: Tower, names: dict[str, str], out: Path, progress: Callable[[str], None]
) -> dict[str, str]:
    """The files' SHA-256 by name. The tower's weights are those of the original, where it trained them."""
    own_tower = any(name.startswith("vision_tower.") for name in names.values())
    count = len(original.shards) + (not own_tower)
    files: dict[str, str] = {}
    where: dict[str, str] = {}
    total, dtype = 0, torch.float16
    for number in range(1, count + 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        progress(name)
        if number <= len(original.shards):
            with safe_open(original.shards[number - 1], "pt") as file:
                tensors = {names[key]: _grown(names[key], file.get_tensor(key), original.rows) for key in file.keys()}
            dtype = next(iter(tensors.values())).dtype
        else:
            tensors = {key: tensor.to(dtype).contiguous() for key, tensor in tower.tensors()}
        save_tensors(tensors, out / name)
        files[name], where = sha256(out / name), where | dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return files


def _grown(name: str, tensor: Tensor, rows: int) -> Tensor:
    """The embedding and the head with rows for new tokens, each the mean of the others: none is ever read or likely."""
    if not name.endswith(("embed_tokens.weight", "lm_head.weight")) or len(tensor) >= rows:
        return tensor
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")
