"""Text as it grows: whole characters, nothing lost, and never a stop string or what stands behind it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from models.preprocess import Preprocessor
from server.detokenize import BLANKS, Detokenizer, LogprobQueue
from server.request import TokenLogprob
from tests.server.tiny import config, processor

TOKENIZER = processor().tokenizer
PREPROCESSOR = Preprocessor(processor(), config())
SPELL = PREPROCESSOR.token_bytes
ALPHABET = "abAB 0.\n\u00e9\u4e2d\U0001f60e"
texts = st.text(ALPHABET, max_size=30)
any_tokens = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40)
stops = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3)


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def decode(ids: Sequence[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def stream(ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], Detokenizer]:
    """The pieces as the engine asks for them: one per token until it stops, then what is left."""
    text = Detokenizer(SPELL, stop)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.finish()], text


@given(ids=any_tokens)
@example(ids=[*encode("\U0001f60e")[:2], *encode("a")])
def test_pieces_make_the_whole_text_whatever_the_model_says(ids):
    assert "".join(stream(ids)[0]) == decode(ids).lstrip(BLANKS)


@given(text=texts)
def test_characters_of_several_bytes_are_never_split(text):
    assume("\ufffd" not in text)
    pieces, _ = stream(encode(text))
    assert "".join(pieces) == text.lstrip(BLANKS)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_out_with_its_last_byte():
    ids = encode("\U0001f60e")
    assert len(ids) == 4
    assert stream(ids)[0] == ["", "", "", "\U0001f60e", ""]


def test_an_unfinished_character_at_the_end_is_shown_as_such():
    pieces, _ = stream(encode("a\u4e2d")[:-1])
    assert pieces[0] == "a"
    assert set(pieces[-1]) == {"\ufffd"}


@given(text=texts, stop=stops)
@example(text="aaab", stop=["aab"])
@example(text="abab", stop=["abb", "ba"])
@example(text=" a", stop=["a"])
def test_nothing_of_a_stop_string_or_behind_it_is_ever_seen(text, stop):
    ids = encode(text)
    pieces, detokenizer = stream(ids, stop)
    seen = "".join(pieces)
    whole = decode(ids).lstrip(BLANKS)
    assert not any(s in seen for s in stop)
    assert whole.startswith(seen)
    if detokenizer.stopped:
        assert any(whole[len(seen) :].startswith(s) for s in stop), "cut exactly where a stop string begins"
    else:
        assert seen == whole
        assert not any(s in whole for s in stop)


@given(ids=any_tokens, stop=st.lists(st.text("ab \ufffd", min_size=1, max_size=3), min_size=1, max_size=2))
def test_stop_strings_hold_for_broken_bytes_too(ids, stop):
    pieces, detokenizer = stream(ids, stop)
    seen = "".join(pieces)
    assert not any(s in seen for s in stop)
    assert detokenizer.stopped or seen == decode(ids).lstrip(BLANKS)


@given(text=texts, stop=stops)
def test_what_is_out_is_final(text, stop):
    """No piece is taken back: after each token, what was shown is how the answer will begin."""
    pieces, _ = stream(encode(text), stop)
    shown = ""
    for piece in pieces:
        shown += piece
        assert "".join(pieces).startswith(shown)


def test_a_half_seen_stop_string_is_held_and_let_go():
    text = Detokenizer(SPELL, ["QX"])
    assert [text.push(token) for token in encode("AQ")] == ["A", ""]
    assert text.push(encode("R")[0]) == "QR"
    assert not text.stopped
    assert text.finish() == ""


def test_before_it_may_stop_a_stop_string_is_text():
    text = Detokenizer(SPELL, ["QX"])
    assert [text.push(token, may_stop=False) for token in encode("QX")] == ["Q", "X"]
    assert "".join(text.push(token) for token in encode("AQX")) == "A"
    assert text.stopped


def test_a_continued_text_keeps_its_leading_blank():
    (token,) = encode(" circle")
    assert [Detokenizer(SPELL, continues=continues).push(token) for continues in (False, True)] == ["circle", " circle"]
    entry = TokenLogprob(" circle", -1.0, b" circle")
    shown = [LogprobQueue(continues).push(entry, "circle", holds=False, stopped=False) for continues in (False, True)]
    assert [one.bytes for (one,) in shown] == [b"circle", b" circle"]


def test_a_held_piece_comes_out_at_the_end():
    text = Detokenizer(SPELL, ["QX"])
    assert [text.push(token) for token in encode("AQ")] == ["A", ""]
    assert text.finish() == "Q"


def test_the_first_of_several_stop_strings_in_one_token_counts():
    (token,) = encode(" circle")
    text = Detokenizer(SPELL, ["l", "r", "le"])
    assert text.push(token) == "ci"
    assert text.stopped
    assert text.finish() == ""


def test_an_empty_stop_string_stops_nothing():
    assert "".join(stream(encode("A B"), [""])[0]) == "A B"


def test_special_tokens_have_no_text():
    ids = [*encode("A"), TOKENIZER.pad_token_id, TOKENIZER.convert_tokens_to_ids("<image>"), *encode("B")]
    assert "".join(stream(ids)[0]) == "AB"


def logprobs(ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[str, list[TokenLogprob]]:
    """The text and what stands behind it, in the order in which the engine asks."""
    text, queue, pieces, entries = Detokenizer(SPELL, stop), LogprobQueue(), [], []
    for place, token in enumerate(ids):
        piece = text.push(token)
        last = text.stopped or place == len(ids) - 1
        pieces.append(piece + text.finish() if last else piece)
        entry = TokenLogprob(PREPROCESSOR.token_text(token), -1.0, SPELL(token))
        entries += queue.push(entry, pieces[-1], holds=text.holds, stopped=text.stopped)
        shown = b"".join(entry.bytes for entry in entries).decode(errors="replace")
        assert "".join(pieces).startswith(shown), "no log-probability comes before its text"
        if last:
            break
    return "".join(pieces), entries


@given(text=texts, stop=stops)
@example(text=" aab", stop=["ab"])
@example(text="\U0001f60eb", stop=["b"])
def test_bytes_of_log_probabilities_are_the_content(text, stop):
    ids = encode(text)
    seen, entries = logprobs(ids, stop)
    assert b"".join(entry.bytes for entry in entries).decode() == seen


@given(ids=any_tokens)
def test_no_token_goes_without_its_log_probability(ids):
    assert len(logprobs(ids)[1]) == len(ids)


@given(ids=any_tokens)
def test_token_bytes_joined_are_what_the_tokenizer_decodes(ids):
    assert b"".join(map(SPELL, ids)).decode(errors="replace") == decode(ids)


def test_half_characters_blanks_and_special_tokens_spelled():
    assert [SPELL(token) for token in encode("\u00e9")] == [b"\xc3", b"\xa9"]
    (token,) = encode(" circle")
    assert (SPELL(token), PREPROCESSOR.token_text(token)) == (b" circle", " circle")
    assert (SPELL(TOKENIZER.eos_token_id), PREPROCESSOR.token_text(TOKENIZER.eos_token_id)) == (b"", "</s>")


def test_sentencepiece_tokenizers_spell_too():
    vocabulary = {"<unk>": 0, "</s>": 1, "<0xC3>": 2, "<0xA9>": 3, "\u2581red": 4, "star": 5}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    other = SimpleNamespace(tokenizer=tokenizer, image_processor=processor().image_processor)
    spell = Preprocessor(other, config()).token_bytes
    assert [spell(token) for token in range(7)] == [b"", b"", b"\xc3", b"\xa9", b" red", b"star", b""]
