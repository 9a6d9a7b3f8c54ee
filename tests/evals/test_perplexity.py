"""Perplexity on text: against a loop over single tokens, beside another language model, and what cannot be compared."""

from __future__ import annotations

import json
from math import exp, log

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from evals import perplexity
from models.checkpoint import open_transformers
from tests.server.tiny import processor, write

TEXTS = {"a long text": "The cat sat on the mat. " * 40, "a short one": "Two dogs ran home. " * 3}


@pytest.fixture(scope="module")
def real_texts():
    return perplexity.texts()


@pytest.fixture(autouse=True)
def short_passages(monkeypatch, real_texts):
    monkeypatch.setattr(perplexity, "PASSAGE", 16)
    monkeypatch.setattr(perplexity, "texts", lambda: TEXTS)


@pytest.fixture(scope="module", name="directory")
def tiny_checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("perplexity") / "tiny-llava")


@pytest.fixture(scope="module", name="language_model")
def its_language_model(directory, tmp_path_factory):
    """The checkpoint's own language model as a directory of its own."""
    source = open_transformers(directory, dtype="float32").model
    model = LlamaForCausalLM(source.config.text_config)
    model.model.load_state_dict(source.model.language_model.state_dict())
    model.lm_head.load_state_dict(source.lm_head.state_dict())
    path = tmp_path_factory.mktemp("language") / "tiny-llama"
    model.save_pretrained(path)
    return path


def test_there_is_english_text_enough_on_every_machine(real_texts):
    assert len(real_texts) == 1 + len(perplexity.LICENCES)
    assert sum(map(len, real_texts.values())) > 6 * perplexity.PASSAGES * 1024, "characters: six and more make a token at most"
    assert all("the" in text for text in real_texts.values())


def test_loss_is_that_of_one_token_after_the_other(language_model):
    model = AutoModelForCausalLM.from_pretrained(language_model, dtype="float32").eval()
    passage = torch.tensor([5, 9, 2, 7, 40, 11])
    by_hand = 0.0
    for length in range(1, len(passage)):
        with torch.no_grad():
            by_hand -= float(model(input_ids=passage[None, :length]).logits[0, -1].log_softmax(-1)[passage[length]])
    assert perplexity.loss(model, passage) == pytest.approx(by_hand, rel=1e-5)


def test_passages_are_whole_and_the_longest_text_fills_up(directory):
    found = perplexity.passages(processor().tokenizer, 8)
    assert sum(map(len, found.values())) == 8
    assert {ids.shape[1] for ids in found.values()} == {16}
    assert list(found) == ["a short one", "a long text"]
    assert perplexity.passages(processor().tokenizer, 1).keys() == {"a short one"}


def test_summary_weighs_sources_by_their_tokens():
    losses = {"ours": {"a": 10 * log(4), "b": 30 * log(2)}, "theirs": {"a": 10 * log(2), "b": 30 * log(2)}}
    document = perplexity.summarise(losses, {"a": 10, "b": 30})
    assert document["sources"]["a"] == {"tokens": 10, "perplexity": 4.0, "against": 2.0, "ratio": 2.0}
    assert document["perplexity"] == pytest.approx(exp((10 * log(4) + 30 * log(2)) / 40), abs=1e-4)
    assert document["tokens"] == 40


def test_a_checkpoint_beside_its_own_language_model_is_no_worse(directory, language_model, capsys):
    document = perplexity.run(directory, language_model, 6, "cpu", "float32", quiet=True)
    assert json.loads(capsys.readouterr().out) == document
    assert document["ratio"] == pytest.approx(1, abs=1e-4)
    assert document["tokens"] == 6 * 15 and document["perplexity"] > 1
    alone = perplexity.run(directory, None, 6, "cpu", "float32", quiet=False)
    assert alone["perplexity"] == document["perplexity"] and "ratio" not in alone
    assert "a long text" in capsys.readouterr().err


def test_another_vocabulary_or_no_model_is_refused(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "find_spec", lambda package: None)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
    )).save_pretrained(tmp_path / "other")  # fmt: skip
    (tmp_path / "nothing").mkdir()
    (tmp_path / "language.gguf").write_bytes(b"GGUF")
    for name, message in {
        "other": "has 50 tokens in its vocabulary and tiny-llava has", "nothing": "is not a language model that transformers loads",
        "language.gguf": "pip install accelerate gguf", "none.gguf": "does not exist; name a GGUF file or a directory",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            perplexity.run(directory, tmp_path / name, 1, "cpu", "float32", quiet=True)
