"""How smol's training packs conversations about a picture, and that its model is the language model until it is trained."""

from __future__ import annotations

from random import Random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from checkpoints.smol import model as smol
from checkpoints.smol.data import IGNORE, TAG_SIDE, VISUAL, Batches, Packer, Said, Sizes
from checkpoints.smol.tags import TAGGED
from models.vision.efficientnet import EfficientNetLiteConfig, EfficientNetLiteTower


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<|im_start|>", "<|im_end|>", "<?>", "user", "assistant", "what", "where", "is", "it", "this", "dog", "left"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<?>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<?>", eos_token="<|im_end|>", extra_special_tokens={"start": "<|im_start|>"}
    )


ASKED = [Said("what", "what is this", "dog"), Said("where", "where is it", "left")]


def test_conversations_keep_the_positions_they_have_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    packer = Packer(tokenizer, follow_up=0.0)
    both, alone = packer.pack(ASKED, 3, 64, Random(0)), packer.pack(ASKED[1:], 3, 64, Random(0))
    second = both["segments"] == 2
    first = len(packer.head)
    assert both["positions"][second].tolist() == alone["positions"][alone["segments"] == 1].tolist()
    assert both["positions"][second][0] == first + VISUAL


def test_only_answers_and_their_ends_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Packer(tokenizer, follow_up=0.0).pack(ASKED, 1, 64, Random(0))
    learned = tokenizer.convert_ids_to_tokens(row["labels"][row["labels"] != IGNORE].tolist())
    assert learned == ["dog", "<|im_end|>", "left", "<|im_end|>"]


def test_a_question_without_room_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Packer(tokenizer, follow_up=0.0).pack(ASKED, 1, 16, Random(0))
    assert len(row["ids"]) == 16
    assert [said.type for said, _, _ in row["taken"]] == ["what"]


def test_a_batch_is_the_same_whenever_it_is_drawn(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_THINGS", "samples")
    batches = Batches(Packer(tokenizer), Sizes(scenes=2, crowded=1, rows=100), kept=(VISUAL, 64), count=2)
    first, again, fewer = batches[0], batches[0], batches[1]
    assert all(torch.equal(first[name], again[name]) for name in ("ids", "labels", "pixels", "shown"))
    assert first["pixels"].shape == (3, 544, 544, 3)
    assert (first["kept"], fewer["kept"]) == (VISUAL, 64)
    assert first["shown"].shape == (1, VISUAL)
    assert first["shown"].any()


def test_untrained_model_is_the_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 72, "LAYERS": 2, "DIM": 8}.items():
        monkeypatch.setattr(smol, name, value)
    config = LlamaConfig(
        hidden_size=72, intermediate_size=96, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3, vocab_size=50,
        rope_theta=smol.THETA, rms_norm_eps=smol.EPS, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval()
    tower = EfficientNetLiteTower(EfficientNetLiteConfig(blocks=[(3, 2, 1, 6), (3, 2, 2, 8)], head=20))
    ours = smol.Smol(theirs.state_dict(), tower)
    ids = torch.randint(0, 50, (1, 9))
    with torch.no_grad():
        hidden = ours(ids, torch.arange(9)[None], torch.ones_like(ids))
        assert torch.allclose(ours.logits(hidden), theirs(ids).logits, atol=1e-5)


def test_scenes_take_the_turns_that_are_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = Batches(Packer(tokenizer), Sizes(scenes=2, crowded=0, rows=100), kept=(64,), turns=("charts", "boards"))
    asked = [{said.type for said, _, _ in taken} for taken in batches[3]["taken"]]
    assert asked[0] & {"tallest", "height", "slice_largest"} and asked[1] & {"cell", "rows", "row"}
    assert batches[3]["shown"].shape == (0, VISUAL)


def test_what_is_told_of_a_scene_lies_beside_it(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_THINGS", "samples")
    batch = Batches(Packer(tokenizer), Sizes(scenes=2, crowded=0, rows=100), kept=(64,), turns=("charts", TAGGED))[1]
    assert batch["told"][0] == -1 and batch["told"][1] >= 0
    assert batch["sure"].shape == (2, TAG_SIDE, TAG_SIDE)
    assert not batch["sure"][0].any() and batch["sure"][1].any()
