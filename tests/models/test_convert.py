"""LLaVA's original directories: what is converted answers as the model it was, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from models.checkpoint import load
from models.convert import convert
from models.errors import CheckpointError
from models.families import family_of
from models.llava import UnsupportedCheckpoint
from models.random_llava import random_model
from tests.models.hub import CLIP_SIZE, PIXELS, SIGLIP_SIZE, hub_config
from tests.models.saved import edit, put
from tests.models.test_families import arguments, chat, photograph
from tests.server.tiny import processor

ORIGINALS: dict[str, dict[str, Any]] = {
    "llava_llama": {"family": "llava", "text": "llama", "architecture": "LlavaLlamaForCausalLM", "image_aspect_ratio": "pad"},
    "llava_mistral": {"family": "llava_next", "text": "mistral", "architecture": "LlavaMistralForCausalLM",
                      "image_aspect_ratio": "anyres"},
    "llava_qwen": {"family": "llava_onevision", "text": "qwen2", "architecture": "LlavaQwenForCausalLM",
                   "image_aspect_ratio": "anyres_max_4"},
}  # fmt: skip
OLD_NAMES = (
    ("language_model.model.", "model."), ("language_model.lm_head", "lm_head"), ("image_newline", "model.image_newline"),
    ("multi_modal_projector.linear_1", "model.mm_projector.0"), ("multi_modal_projector.linear_2", "model.mm_projector.2"),
)  # fmt: skip


def old_name(name: str) -> str:
    return next((old + name.removeprefix(new) for new, old in OLD_NAMES if name.startswith(new)), name)


def write_original(directory: Path, kind: str, *, with_tower: bool = False) -> tuple[Any, Path, Path]:
    """The model that was written, its original directory and its tower's."""
    about = ORIGINALS[kind]
    config = hub_config(about["family"], about["text"])
    model, source, tower = random_model(config, seed=3), directory / "original", directory / "tower"
    model.save_pretrained(directory / "saved")
    tensors = load_file(directory / "saved" / "model.safetensors")
    seen = {name.removeprefix("vision_tower."): tensor for name, tensor in tensors.items() if name.startswith("vision_tower.")}
    spoken = {old_name(name): tensor for name, tensor in tensors.items() if not name.startswith("vision_tower.")}
    if with_tower:
        spoken |= {f"model.vision_tower.vision_tower.vision_model.{name}": tensor for name, tensor in seen.items()}
        seen = {name: torch.zeros_like(tensor) for name, tensor in seen.items()}
    source.mkdir()
    tower.mkdir()
    save_file(spoken, source / "model.safetensors", metadata={"format": "pt"})
    text_model = {f"text_model.{name}": torch.zeros(1) for name in ("embeddings.token_embedding.weight", "encoder.layers.0.x")}
    save_file({f"vision_model.{name}": tensor for name, tensor in seen.items()} | text_model, tower / "model.safetensors")
    processor().tokenizer.save_pretrained(source)
    text = {key: value for key, value in config.text_config.to_dict().items() if key != "dtype"}
    grids = getattr(config, "image_grid_pinpoints", None)
    (source / "config.json").write_text(json.dumps(text | {
        "architectures": [about["architecture"]], "model_type": kind, "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 32,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "image_aspect_ratio": about["image_aspect_ratio"], "torch_dtype": "float32",
        "image_grid_pinpoints": grids and [[width, height] for height, width in grids],
    }))  # fmt: skip
    siglip = config.vision_config.model_type == "siglip_vision_model"
    vision = config.vision_config.to_dict() | {"vision_use_head": True} if siglip else config.vision_config.to_dict()
    (tower / "config.json").write_text(json.dumps({"model_type": "siglip" if siglip else "clip", "vision_config": vision}))
    (tower / "preprocessor_config.json").write_text(json.dumps(PIXELS | (SIGLIP_SIZE if siglip else CLIP_SIZE)))
    return model, source, tower


@pytest.mark.parametrize("with_tower", [False, True])
@pytest.mark.parametrize("kind", ORIGINALS)
def test_what_is_converted_answers_as_the_model_it_was(tmp_path, kind, with_tower):
    model, source, tower = write_original(tmp_path, kind, with_tower=with_tower)
    convert(source, tower, tmp_path / "out")
    loaded = load(tmp_path / "out")
    picture = loaded.preprocessor.picture(photograph(40, 90))
    ids = loaded.preprocessor.prompt(chat(1), [picture.layout])
    again = family_of(model.config).model.from_pretrained(tmp_path / "out", dtype=torch.float32)
    given = arguments(model.config, [(40, 90)], [picture.pixels])
    with torch.no_grad():
        expected, got = (one(input_ids=torch.tensor([ids]), **given).logits for one in (model, again))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert loaded.manifest.base_model == "original"
    assert loaded.model.config.model_type == ORIGINALS[kind]["family"]


def test_pictures_are_padded_as_they_were_in_training(tmp_path):
    _, source, tower = write_original(tmp_path, "llava_llama")
    convert(source, tower, tmp_path / "out")
    pixels = load(tmp_path / "out").preprocessor.picture(photograph(20, 90)).pixels[0]
    assert pixels[:, :10].abs().max() < 0.02, "the mean colour above"
    assert pixels[:, 13:19].std() > 0.1


def test_a_vocabulary_without_an_image_token_grows(tmp_path):
    _, source, tower = write_original(tmp_path, "llava_llama")
    document = json.loads((source / "tokenizer.json").read_text())
    image = processor().tokenizer.convert_tokens_to_ids("<image>")
    for token in document["added_tokens"]:
        if token["id"] == image:
            token["content"] = "<unused>"
    document["model"]["vocab"]["<unused>"] = document["model"]["vocab"].pop("<image>")
    (source / "tokenizer.json").write_text(json.dumps(document))
    settings = source / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<image>", "<unused>"))
    convert(source, tower, tmp_path / "out")
    loaded, known = load(tmp_path / "out"), len(processor().tokenizer)
    assert loaded.model.config.image_token_id == known
    assert len(loaded.model.embedding) == len(loaded.model.head.weight) == -(-(known + 1) // 64) * 64
    assert loaded.preprocessor.prompt(chat(1)).count(known) == 16


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llava_llama", "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
                        "detailed, and polite answers to the user's questions. "
                        "USER: <image>\nHi ASSISTANT: Yes</s>USER: Why? ASSISTANT:"),
        ("llava_mistral", "[INST] <image>\nHi [/INST] Yes</s>[INST] Why? [/INST]"),
    ],
)  # fmt: skip
def test_the_chat_is_the_one_it_was_trained_on(tmp_path, kind, expected):
    _, source, tower = write_original(tmp_path, kind)
    convert(source, tower, tmp_path / "out")
    assert rendered(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["<|im_start|>", "<|im_end|>"], "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nHi"
         "<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"),
        (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
         "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant.<|eot_id|>"
         "<|start_header_id|>user<|end_header_id|>\n\n<image>\nHi<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\nYes<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    ],
)  # fmt: skip
def test_other_chats_are_told_by_their_tokens(tmp_path, tokens, expected):
    _, source, tower = write_original(tmp_path, "llava_llama")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.save_pretrained(source)
    convert(source, tower, tmp_path / "out")
    assert rendered(tmp_path / "out") == expected


def rendered(directory: Path) -> str:
    messages = [*chat(1, "Hi"), {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "Why?"}]
    tokenizer = load(directory).preprocessor.tokenizer
    template = (directory / "chat_template.jinja").read_text()
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)


# ---- what is wrong


def test_a_missing_tower_is_named(tmp_path):
    _, source, tower = write_original(tmp_path, "llava_llama")
    for given in (None, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"needs its vision tower, openai/clip-vit-large-patch14-336: .*--tower"):
            convert(source, given, tmp_path / "out")
    (tower / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tower/model.safetensors is missing"):
        convert(source, tower, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("where", "change", "words"),
    [
        ("original", put("architectures", value=["LlavaMptForCausalLM"]), "LlavaMptForCausalLM is not one of"),
        ("original", put("mm_projector_type", value="linear"), "mm_projector_type 'linear' is not supported"),
        ("original", put("mm_use_im_start_end", value=True), "mm_use_im_start_end"),
        ("original", put("mm_hidden_size", value=1152), "is 32 wide and the projector reads 1152"),
        ("tower", put("model_type", value="dinov2"), "'dinov2' is not supported as a tower"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path, where, change, words):
    _, source, tower = write_original(tmp_path, "llava_llama")
    edit(tmp_path / where / "config.json", change)
    with pytest.raises(CheckpointError, match=words):
        convert(source, tower, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change_tensors(directory: Path, rename: dict[str, str | None]) -> None:
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if (new := rename.get(name, name)) is not None:
            tensors[new] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_half_converted_names_are_named(tmp_path):
    _, source, tower = write_original(tmp_path, "llava_llama")
    change_tensors(source, {"model.mm_projector.0.weight": "multi_modal_projector.linear_1.weight"})
    with pytest.raises(CheckpointError, match=r"multi_modal_projector.linear_1.weight is no tensor of an original.*half conv"):
        convert(source, tower, tmp_path / "out")
    change_tensors(source, {"multi_modal_projector.linear_1.weight": None})
    with pytest.raises(CheckpointError, match=r"no file holds model.mm_projector"):
        convert(source, tower, tmp_path / "out")


def test_names_half_converted_are_refused_at_loading_too(tmp_path):
    _, source, tower = write_original(tmp_path, "llava_llama")
    convert(source, tower, tmp_path / "out")
    first = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    tensors = {name.replace("multi_modal_projector.linear_1", "model.mm_projector.0"): t for name, t in load_file(first).items()}
    save_file(tensors, first, metadata={"format": "pt"})
    edit(tmp_path / "out" / "espalier.json", put("files", value={}))
    with pytest.raises(CheckpointError, match=r"linear_1.*names that no part takes, first .*mm_projector.*half converted"):
        load(tmp_path / "out")


def test_an_original_directory_says_how_to_convert_it(tmp_path):
    _, source, _ = write_original(tmp_path, "llava_llama")
    with pytest.raises(CheckpointError, match=r"LlavaLlamaForCausalLM.*convert it with `espalier convert`"):
        load(source)


def test_what_exists_is_not_overwritten(tmp_path):
    _, source, tower = write_original(tmp_path, "llava_llama")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists; name a directory that does not"):
        convert(source, tower, tmp_path / "out")


def test_grids_that_do_not_fit_the_tower_are_refused_at_loading(tmp_path):
    _, source, tower = write_original(tmp_path, "llava_mistral")
    edit(source / "config.json", put("image_grid_pinpoints", value=[[48, 32]]))
    convert(source, tower, tmp_path / "out")
    with pytest.raises(UnsupportedCheckpoint, match="is not a grid of tiles"):
        load(tmp_path / "out")
