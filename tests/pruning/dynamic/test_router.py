"""The router: what it reads, what it makes of a request, and when its file is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from espalier import app
from models.checkpoint import load
from models.errors import CheckpointError
from models.vision.features import ImageFeatures
from pruning.dynamic.planner import Planner
from pruning.dynamic.router import MAX_TEXT, RequestRouting, Router, RouterConfig, RouterFailed, score_request, text_window
from pruning.dynamic.router_file import FILE, load_router
from pruning.dynamic.token_merging import euclidean, means, members
from tests.pruning.dynamic.tiny_router import plain_checkpoint, routed_checkpoint  # noqa: F401
from tests.server.tiny import VISUAL, ask, new_engine


def test_it_reads_the_prompts_end_but_nothing_before_the_picture():
    assert text_window([1, 5, 9, 9, 6, 7], image_token=9) == [6, 7]
    assert text_window([1, 9, 5, 9, 6], image_token=9) == [5, 6]
    assert text_window(list(range(100, 300)), image_token=9) == list(range(300 - MAX_TEXT, 300))


def test_scores_depend_on_the_question_and_not_on_padding():
    torch.manual_seed(0)
    router = Router(RouterConfig(model_width=24, model_layers=3, width=16))
    visual, text = torch.randn(2, 9, 24), torch.randn(2, 5, 24)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    together, alone = router(visual, text, mask), router(visual[1:], text[1:, :3])
    other = router(visual[:1], text[1:])
    for part in ("token_scores", "layer_scores"):
        torch.testing.assert_close(getattr(together, part)[1], getattr(alone, part)[0])
        assert not torch.allclose(getattr(together, part)[:1], getattr(other, part), atol=1e-3)
    torch.testing.assert_close(router.pooled_features(together)[1], router.pooled_features(alone)[0])
    kept = torch.tensor([[0, 4, 7]])
    shares = members(euclidean(visual[1:]), kept)
    torch.nn.init.normal_(router.corrector.out.weight)
    corrected = router.corrector(type(together)(*(part[1:] for part in together)), visual[1:], kept, shares)
    torch.testing.assert_close(corrected, router.corrector(alone, visual[1:], kept, shares))


@pytest.mark.parametrize("tokens", [1, 5, 16, 577])
def test_pictures_of_any_size_and_no_question_are_scored(tokens):
    router = Router(RouterConfig(24, 4, 16))
    output = router(torch.randn(1, tokens, 24), torch.randn(1, 0, 24))
    assert (output.token_scores.shape, output.layer_scores.shape) == ((1, tokens), (1, 4))
    assert torch.isfinite(router.agreement(router.pooled_features(output))).all()


def test_an_untrained_router_leaves_the_plain_means():
    torch.manual_seed(0)
    router, visual = Router(RouterConfig(24, 4, 16)), torch.randn(2, 12, 24)
    routing = RequestRouting(router, visual, router(visual, torch.randn(2, 3, 24)))
    for image, kept in zip(visual, routing.keep_tokens(5), strict=True):
        expected = means(image, members(euclidean(image), kept.indices))
        torch.testing.assert_close(kept.tokens[kept.indices], expected)
        assert sum(kept.sizes) == 12


@pytest.mark.parametrize(("keep", "added"), [(2, 1.0), (9, 0.5), (18, 0.0)])
def test_less_of_the_correction_is_added_where_more_tokens_stay(keep, added):
    torch.manual_seed(0)
    router, visual = Router(RouterConfig(24, 4, 16)), torch.randn(1, 36, 24)
    router.corrector.out.bias.data.fill_(1.0)
    routing = RequestRouting(router, visual, router(visual, torch.randn(1, 3, 24)))
    (kept,) = routing.keep_tokens(keep)
    plain = means(visual[0], members(euclidean(visual[0]), kept.indices))
    scale = visual.square().mean().sqrt()
    torch.testing.assert_close(kept.tokens[kept.indices] - plain, torch.full((keep, 24), added * float(scale)))


def test_it_costs_under_three_percent_of_a_prefill_at_7b():
    config, rows = RouterConfig(4096, 32, 1024), 576 + 40
    dense = 2 * rows * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert config.flops(576, 40, 0) < config.flops(576, 40, 288) < 0.03 * dense


def test_agreement_is_that_of_the_hardest_picture(routed):
    checkpoint = load(routed)
    router = load_router(checkpoint)
    pictures = [ask(new_engine(checkpoint), (number,)).images[0].picture.pixels for number in range(3)]
    features = [checkpoint.model.vision(pixels) for pixels in pictures]
    one_by_one = [score_request(router, checkpoint.model, [image], [40, 41]).expected_agreement for image in features]
    together = score_request(router, checkpoint.model, features, [40, 41]).expected_agreement
    torch.testing.assert_close(torch.tensor(together), torch.tensor(one_by_one).amin(0))


def test_scores_or_corrections_that_are_not_finite_fail_it(routed):
    checkpoint = load(routed)
    image = ImageFeatures(torch.randn(1, VISUAL, 48), torch.rand(1, VISUAL))
    router = load_router(checkpoint)
    router.corrector.out.bias.fill_(torch.nan)
    with pytest.raises(RouterFailed, match="the corrected tokens"):
        score_request(router, checkpoint.model, [image], [5]).keep_tokens(3)
    router.token_head.bias.fill_(torch.nan)
    with pytest.raises(RouterFailed, match="the router's scores"):
        score_request(router, checkpoint.model, [image], [5])


# ---- its file


def test_inspect_shows_what_there_is_to_choose_from(routed):
    shown = CliRunner().invoke(app, ["inspect", str(routed)])
    assert shown.exit_code == 0, shown.output
    assert f"│ {VISUAL} " in shown.output.split("The router's operating points")[1]


def copy(routed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(routed, tmp_path / "copy"))


def test_a_router_of_another_checkpoint_is_refused(routed, tmp_path):
    directory = copy(routed, tmp_path)
    manifest = json.loads((directory / "espalier.json").read_text())
    manifest["router"]["checkpoint"] = "fp_000000000000"
    (directory / "espalier.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="was trained for checkpoint fp_000000000000 and this one is fp_"):
        Planner(load(directory))


@pytest.mark.parametrize("key", ["config", "levels", "operating_points"])
def test_a_section_that_lacks_a_key_is_refused_by_its_name(routed, tmp_path, key):
    directory = copy(routed, tmp_path)
    manifest = json.loads((directory / "espalier.json").read_text())
    del manifest["router"][key]
    (directory / "espalier.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=rf"router\.{key}: .*run `espalier route`"):
        Planner(load(directory))


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("config", "width", 2**62, r"does not load .*; run `espalier route`"),
        ("config", "depth", 10**12, r"does not load \(1000000000000 layers"),
        ("config", "model_width", 2**40, r"does not load \(.* and not .*; run `espalier route`"),
        ("operating_points", 0, {"visual_ratio": 1e308}, r"router\.operating_points\.0\.visual_ratio"),
        ("operating_points", 0, {"cost": float("nan")}, r"router\.operating_points\.0\.cost"),
        ("operating_points", 0, {"skipped_layers": 10**9}, "more layers than there are"),
    ],
)
def test_a_router_whose_sizes_make_no_sense_is_refused_at_once(routed, tmp_path, section, key, value, words):
    directory = copy(routed, tmp_path)
    manifest = json.loads((directory / "espalier.json").read_text())
    manifest["router"][section][key] = value
    (directory / "espalier.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=words):
        Planner(load(directory))


def test_a_truncated_router_is_refused(routed, tmp_path):
    directory = copy(routed, tmp_path)
    whole = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"router\.safetensors is not the file that espalier\.json describes"):
        load(directory)
    manifest = json.loads((directory / "espalier.json").read_text())
    del manifest["files"][FILE]
    (directory / "espalier.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"does not load .*; run `espalier route`"):
        load_router(load(directory))
