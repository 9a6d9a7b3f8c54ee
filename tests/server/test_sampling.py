"""Drawing tokens: what each knob may and may not change."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from server.request import Sampling
from server.sampling import is_greedy, new_generator, penalize, sample, top_logprobs, truncate

logit_rows = st.lists(st.floats(-30, 30, width=32) | st.floats(-2, 2, width=32), min_size=2, max_size=40).map(torch.tensor)
made_tokens = st.lists(st.integers(0, 1), max_size=20)


def draws(logits: Tensor, count: int = 300, seed: int = 0, made: tuple[int, ...] = (), **options: float) -> Counter[int]:
    generator = new_generator(seed)
    sampling = Sampling(**{"temperature": 1.0, **options})
    return Counter(sample(logits, made, sampling, generator) for _ in range(count))


@given(logits=logit_rows)
def test_temperature_zero_takes_the_largest(logits):
    token = sample(logits, [], Sampling(), new_generator(None))
    assert logits[token] == logits.max()
    assert is_greedy(Sampling())
    assert not is_greedy(Sampling(temperature=0.1))
    assert not is_greedy(Sampling(presence_penalty=0.1))
    assert not is_greedy(Sampling(frequency_penalty=-0.1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_next_to_no_temperature_is_greedy_and_never_an_overflow(temperature):
    assert draws(torch.tensor([1.0, 90.0, 3.0, -50.0]), count=20, temperature=temperature).keys() == {1}


def test_temperature_flattens_and_sharpens():
    logits = torch.tensor([2.0, 1.0, 0.0])
    cold, warm, hot = (draws(logits, temperature=t)[0] for t in (0.3, 1.0, 100.0))
    assert cold > warm > hot
    assert draws(logits, temperature=100.0).keys() == {0, 1, 2}


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    counts = draws(logits, count=3000)
    for token, share in enumerate((0.6, 0.3, 0.1)):
        assert counts[token] / 3000 == pytest.approx(share, abs=0.05)


@given(logits=logit_rows, seed=st.integers(-(2**63), 2**64), temperature=st.floats(0.01, 2), top_p=st.floats(0.01, 1))
def test_the_same_seed_draws_the_same_tokens(logits, seed, temperature, top_p):
    first, second = ([*draws(logits, 5, seed, temperature=temperature, top_p=top_p).elements()] for _ in range(2))
    assert first == second


def test_without_a_seed_draws_differ():
    logits = torch.zeros(1000)
    rows = {tuple(sample(logits, [], Sampling(temperature=1), new_generator(None)) for _ in range(8)) for _ in range(3)}
    assert len(rows) > 1


@given(logits=logit_rows, top_k=st.integers(0, 50), top_p=st.floats(0, 1))
@example(logits=torch.tensor([0.3, 0.5, 0.2]).log(), top_k=0, top_p=0.6)
@example(logits=torch.tensor([0.3, 0.5, 0.2]).log(), top_k=1, top_p=0.9)
def test_truncation_keeps_the_fewest_likeliest_that_reach_top_p(logits, top_k, top_p):
    probabilities = logits.softmax(-1)
    kept = truncate(probabilities, top_k, top_p)
    chosen = kept > 0
    assert torch.equal(kept[chosen], probabilities[chosen])
    assert chosen.any()
    left_out = probabilities[~chosen]
    assert not len(left_out) or probabilities[chosen].min() >= left_out.max()
    if top_k:
        assert chosen.sum() <= top_k
    if chosen.sum() > 1:  # one fewer would not have reached top_p
        assert kept.sum() - kept[chosen].min() < top_p + 1e-5
    if not top_k and top_p < 1:
        assert kept.sum() >= top_p - 1e-5


@given(logits=logit_rows, top_p=st.sampled_from([0.0, 1e-9]))
def test_no_mass_still_leaves_the_likeliest_token(logits, top_p):
    for options in ({"top_p": top_p}, {"top_k": 1}):
        token = sample(logits, [], Sampling(temperature=1, **options), new_generator(0))
        assert logits[token] == pytest.approx(float(logits.max()), abs=1e-5)


@given(logits=logit_rows, made=made_tokens, frequency=st.floats(-2, 2), presence=st.floats(-2, 2))
def test_penalties_are_presence_once_and_frequency_per_time(logits, made, frequency, presence):
    before = logits.clone()
    after = penalize(logits, made, Sampling(frequency_penalty=frequency, presence_penalty=presence))
    assert torch.equal(logits, before), "the model's own logits are what logprobs report"
    counts = Counter(made)
    expected = [float(v) - (presence + frequency * counts[i] if i in counts else 0) for i, v in enumerate(logits)]
    torch.testing.assert_close(after, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_a_penalty_breaks_a_greedy_loop():
    logits = torch.tensor([1.0, 0.5, 0.0])
    sampling = Sampling(frequency_penalty=0.3)
    made: list[int] = []
    for _ in range(5):
        made.append(sample(logits, made, sampling, new_generator(0)))
    assert made == [0, 0, 1, 0, 1]


def test_min_p_keeps_a_share_of_the_best():
    assert draws(torch.tensor([0.6, 0.3, 0.1]).log(), min_p=0.4).keys() == {0, 1}
    assert draws(torch.tensor([0.6, 0.3, 0.1]).log(), min_p=1.0).keys() == {0}


def test_all_tokens_may_be_called_minus_one():
    assert draws(torch.zeros(3), top_k=-1).keys() == {0, 1, 2}


def test_a_bias_forces_and_forbids():
    logits = torch.tensor([3.0, 1.0, 0.0])
    assert draws(logits, logit_bias=((2, 100.0),)).keys() == {2}
    assert sample(logits, [], Sampling(logit_bias=((0, -100.0),)), new_generator(0)) == 1


def test_a_repetition_penalty_counts_the_prompt_and_the_answer():
    logits = torch.tensor([2.0, 1.5, -1.0, 3.0])
    after = penalize(logits, [2], Sampling(repetition_penalty=2.0), prompt=[0, 0])
    assert after.tolist() == [1.0, 1.5, -2.0, 3.0]
    assert sample(logits, [3], Sampling(repetition_penalty=4.0), new_generator(0)) == 0


def test_no_end_before_enough_tokens():
    logits, options = torch.tensor([5.0, 1.0, 0.0]), Sampling(min_tokens=2)
    assert [sample(logits, [1] * made, options, new_generator(0), ends={0}) for made in range(3)] == [1, 1, 0]


@given(logits=logit_rows, count=st.integers(0, 60), data=st.data())
def test_logprobs_are_the_models_own(logits, count, data):
    token = data.draw(st.integers(0, len(logits) - 1))
    own, top = top_logprobs(logits, token, count)
    expected = logits.log_softmax(-1)
    assert own == pytest.approx(float(expected[token]), abs=1e-5)
    assert len(top) == min(count, len(logits))
    assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
    assert all(value == pytest.approx(float(expected[i]), abs=1e-5) for i, value in top)
    assert not top or top[0][1] >= own - 1e-6
