"""The embedded checkpoint before training: configuration, tokenizer, processor and chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from checkpoints.world import SIZE, draw
from models.checkpoint import sha256
from models.manifest import Manifest, write_manifest
from models.saving import save_tensors

PATCH = 8
BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

# LLaVA-1.5's turns: images first, then the text; the tokenizer adds <s> in front.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{{ ' ' }}"
    "{% else %}{{ m['role'].upper() + ':' }}"
    "{% if m['content'] is string %}{{ ' ' + m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ ' <image>\\n' if loop.first else '<image>\\n' }}{% endfor %}"
    "{% set images = m['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ ('' if images and loop.first else ' ') + c['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '</s>' if m['role'] == 'assistant' else ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tokenizer(scenes: int = 400, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the questions and answers of `scenes` training pictures.

    Digits and capital letters are tokens of their own, so that the text on a sign is read character by character.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("USER|ASSISTANT|[A-Z](?![a-z])|[0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        f"USER: \n{q.text} ASSISTANT: {q.answer}"
        for index in range(scenes)
        for q in draw("train", index).questions
        if q.type != "read"
    ]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[PAD, BOS, EOS, IMAGE],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left",
        extra_special_tokens={"image_token": IMAGE}, model_max_length=2048, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"height": SIZE, "width": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_center_crop=False,
            image_mean=list(MEAN), image_std=list(STD),
        ),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """144 visual tokens from a tower of 5 layers; a LLaMA of 8 layers. 9 M parameters in all."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=192, intermediate_size=768, num_hidden_layers=5, num_attention_heads=6, image_size=SIZE,
            patch_size=PATCH, projection_dim=192,
        ),
        text_config=LlamaConfig(
            hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
            vocab_size=len(tokenizer), max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIZE // PATCH) ** 2,
        # The tower's last layer is used; LLaVA-1.5 takes the one before it.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip


def build_model(config: LlavaConfig, seed: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config)


def export(model: LlavaForConditionalGeneration, directory: Path) -> None:
    """Write the checkpoint in bf16 with the key names of the `llava-hf` repositories, so that every runtime loads it."""
    tokenizer = build_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(directory)
    build_processor().save_pretrained(directory)
    weights = directory / "model.safetensors"
    # Newer transformers write the tower without the level that the hub's repositories have, and read both.
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor for name, tensor in load_file(weights).items()
    }
    save_tensors(renamed, weights)
    manifest = Manifest(
        name="espalier-embedded-dense", base_model="espalier-embedded", trained_on="world", files={weights.name: sha256(weights)}
    )
    write_manifest(directory, manifest)
