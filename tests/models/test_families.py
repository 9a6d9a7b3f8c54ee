"""Every family, tower and text model against transformers; and what a picture's layout says of its tokens."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from models.checkpoint import load, open_transformers
from models.families import Layout, family_of, layout_of
from models.flops import flops_ratio
from models.forward import decode_input, forward, prefill_input
from models.llava import Llava, UnsupportedCheckpoint, from_transformers
from models.random_llava import random_model, tiny_config
from models.route import Route
from pruning.dynamic.training.config import TrainingConfig
from pruning.dynamic.training.train import run
from pruning.samples import Sample
from pruning.static.fitness import Divergence
from pruning.static.packing import pack
from server.request import PreparedImage, Request, Sampling
from tests.models.hub import hub_config, write_hub
from tests.models.saved import edit, fails, put
from tests.models.tiny_llava import IMAGE
from tests.server.client import app_of
from tests.server.fake_engine import data_url
from tests.server.tiny import Reader, drain, new_engine

SIZES = [(32, 32), (20, 90), (100, 37), (70, 70), (5, 3), (1, 90), (200, 190), (33, 64)]
"""Odd pictures, height and width."""
TEXTS: dict[str, dict[str, Any]] = {
    "vicuna": {"kind": "llama", "kv_heads": 4},
    "llama3": {"kind": "llama", "rope": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "linear": {"kind": "llama", "rope": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "yarn": {"kind": "qwen2", "rope": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
             "original_max_position_embeddings": 64}},
    "mistral": {"kind": "mistral"},
    "window": {"kind": "mistral", "sliding_window": 600},
    "qwen2": {"kind": "qwen2", "tied": True},
}  # fmt: skip


def config_of(text: str = "vicuna", *, layer: Any = -2, **options: Any) -> Any:
    chosen = dict(TEXTS[text])
    rope, tied, window = chosen.pop("rope", None), chosen.pop("tied", False), chosen.pop("sliding_window", None)
    config = tiny_config(**chosen, **options)
    config.vision_feature_layer = layer
    if rope:
        config.text_config.rope_parameters = rope
    if window:
        config.text_config.sliding_window = window
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    return config


def pair(config: Any) -> tuple[Any, Llava]:
    return random_model(config, seed=1), from_transformers(random_model(config, seed=1))


def pictures(config: Any, sizes: list[tuple[int, int]]) -> tuple[list[Layout], list[torch.Tensor]]:
    layouts = [layout_of(config, *size, alone=len(sizes) == 1) for size in sizes]
    generator = torch.Generator().manual_seed(len(sizes))
    return layouts, [torch.randn(layout.tiles, 3, 32, 32, generator=generator) for layout in layouts]


def arguments(config: Any, sizes: list[tuple[int, int]], pixels: list[torch.Tensor]) -> dict[str, Any]:
    """What transformers' model takes beside the ids."""
    if config.model_type == "llava":
        return {"pixel_values": torch.cat(pixels)}
    most = max(len(tiles) for tiles in pixels)
    padded = [torch.cat([tiles, torch.zeros(most - len(tiles), 3, 32, 32)]) for tiles in pixels]
    found = {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(sizes)}
    return found | ({"batch_num_images": torch.tensor([len(sizes)])} if config.model_type == "llava_onevision" else {})


def prompt_of(layouts: list[Layout]) -> list[int]:
    ids = [1, 9]
    for layout in layouts:
        ids += [*[IMAGE] * layout.visual_tokens, 5]
    return [*ids, 11, 12, 13]


class Asked:
    """One request of our forward."""

    def __init__(self, model: Llava, layouts: list[Layout], pixels: list[torch.Tensor], kept: list[int] | None = None) -> None:
        visual = torch.cat([model.encode(tiles, layout).tokens[0] for tiles, layout in zip(pixels, layouts, strict=True)])
        self.model, self.ids = model, prompt_of(layouts)
        self.route = Route.full(len(visual), model.num_layers)
        if kept is not None:
            self.route = Route(len(visual), tuple(kept), self.route.layers)
        self.cache = model.new_cache(self.route.rows(len(self.ids), 32))
        self.input = prefill_input(model, torch.tensor(self.ids), visual, self.route, self.cache)

    def logits(self) -> torch.Tensor:
        return forward(self.model, [self.input])[0]

    def push(self, token: int) -> None:
        self.input = decode_input(self.model, torch.tensor([token]), len(self.ids), self.route, self.cache)
        self.ids.append(token)


def assert_same_answers(config: Any, sizes: list[tuple[int, int]]) -> None:
    """Prefill and 16 steps: logits within 1e-4, equal greedy tokens."""
    reference, model = pair(config)
    layouts, pixels = pictures(config, sizes)
    asked, given_ = Asked(model, layouts, pixels), arguments(config, sizes, pixels)
    for _ in range(17):
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor([asked.ids]), **given_).logits[0, -1]
        got = asked.logits()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        token = int(expected[:120].argmax())  # none that asks for pixels
        assert int(got[:120].argmax()) == token
        asked.push(token)


@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES[1:4]], ids=["one", "three"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    ("family", "tower"),
    [("llava", "siglip"), ("llava_next", "clip"), ("llava_next", "siglip"), ("llava_onevision", "siglip")],
)
def test_prefill_and_16_steps_match_transformers(family, tower, text, sizes):
    assert_same_answers(config_of(text, family=family, tower=tower), sizes)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_pictures_of_any_size_match_transformers(family, size):
    tower = "clip" if family == "llava_next" else "siglip"
    assert_same_answers(config_of("qwen2", family=family, tower=tower), [size])


@pytest.mark.parametrize(
    ("tower", "layer", "strategy"),
    [
        ("siglip", -1, "full"), ("siglip", -2, "default"), ("siglip", [1, 3], "full"), ("clip", -1, "full"),
        ("clip", [-2, -1], "default"),
    ],
)
def test_feature_layers_and_strategies_match_transformers(tower, layer, strategy):
    config = config_of("qwen2", tower=tower, layer=layer)
    config.vision_feature_select_strategy = strategy
    assert_same_answers(config, SIZES[:3])


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@given(height=st.integers(1, 400), width=st.integers(1, 400))
def test_a_layout_counts_as_transformers_processor_does(family, height, width):
    config = tiny_config(family=family, tower="siglip")
    kind = LlavaNextProcessor if family == "llava_next" else LlavaOnevisionProcessor
    processor = kind.__new__(kind)  # counting needs neither tokenizer nor pictures
    processor.image_processor = type("Grids", (), {"image_grid_pinpoints": config.image_grid_pinpoints})
    processor.patch_size, processor.num_additional_image_tokens, processor.num_image_tokens = 8, 0, 16
    processor.vision_aspect_ratio = "anyres_max_4"
    layout = layout_of(config, height, width)
    assert layout.visual_tokens == processor._get_number_of_features(height, width, 32, 32)
    assert len(layout.newlines) == layout.rows
    assert layout.visual_tokens == layout.whole + layout.rows * layout.columns + len(layout.newlines)
    assert layout.most_tokens(layout.visual_tokens - len(layout.newlines)) == layout.visual_tokens


# ---- directories as the hub has them


FAMILY_TOWERS = [("llava", "siglip"), ("llava_next", "clip"), ("llava_next", "siglip"), ("llava_onevision", "siglip")]


@pytest.fixture(scope="session", params=FAMILY_TOWERS, ids="-".join)
def hub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = hub_config(request.param[0], tower=request.param[1])
    return write_hub(tmp_path_factory.mktemp("hub") / "-".join(request.param), config, max_shard_size="60KB")


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def chat(images: int, text: str = "What color is the star?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}]


@pytest.mark.parametrize("sizes", [[(40, 90)], [(30, 30)], [(40, 90), (33, 20), (64, 64)]])
def test_pictures_and_prompts_are_transformers_own(hub, sizes):
    loaded = load(hub)
    images = [photograph(*size, seed=i) for i, size in enumerate(sizes)]
    seen = [loaded.preprocessor.picture(image, alone=len(images) == 1) for image in images]
    ids = loaded.preprocessor.prompt(chat(len(images)), [picture.layout for picture in seen])
    if loaded.model.config.model_type == "llava_onevision":  # its processor wants torchvision
        batch = AutoImageProcessor.from_pretrained(hub)([images], return_tensors="pt")
        counts = [picture.layout.visual_tokens for picture in seen]
        assert ids.count(loaded.model.config.image_token_id) == sum(counts)
    else:
        own = AutoProcessor.from_pretrained(hub)
        text = own.apply_chat_template(chat(len(images)), add_generation_prompt=True)
        batch = own(text=text, images=images, return_tensors="pt")
        assert ids == batch["input_ids"][0].tolist()
    for picture, expected in zip(seen, batch["pixel_values"], strict=True):
        expected = expected if expected.dim() == 4 else expected[None]
        assert torch.equal(picture.pixels, expected[: len(picture.pixels)])


@pytest.mark.parametrize("sizes", [[(40, 90)], [(100, 37), (33, 20)]])
def test_the_server_answers_as_transformers_generates(hub, sizes):
    loaded = load(hub, dtype="float32")
    engine = new_engine(loaded)
    images = [photograph(*size, seed=i) for i, size in enumerate(sizes)]
    prepared = [PreparedImage(loaded.preprocessor.picture(image, alone=len(images) == 1), str(i)) for i, image in enumerate(images)]
    prompt = loaded.preprocessor.prompt(chat(len(images)), [image.picture.layout for image in prepared])
    reader = Reader()
    engine.submit(Request("one", prompt, prepared, "off", Sampling(max_tokens=12, ignore_eos=True), reader))
    while not engine.scheduler.idle:
        made = engine._running["one"].output_ids if "one" in engine._running else []
        engine.step()
    reference = family_of(loaded.model.config).model.from_pretrained(hub, dtype=torch.float32)
    reference.generation_config.eos_token_id = None
    pixels = [image.picture.pixels for image in prepared]
    with torch.no_grad():
        expected = reference.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=12,
            do_sample=False, **arguments(loaded.model.config, sizes, pixels),
        )[0, len(prompt) :].tolist()  # fmt: skip
    assert len(made) == 12
    assert made == expected
    receipt = reader.finished.receipt
    assert receipt.visual_tokens == receipt.visual_tokens_total == sum(image.picture.layout.visual_tokens for image in prepared)
    assert receipt.flops_ratio == 1


@pytest.mark.parametrize("level", ["light", "balanced", "strong"])
def test_levels_count_tiles_and_newlines(hub, level):
    loaded = load(hub, dtype="float32")
    engine = new_engine(loaded)
    image = PreparedImage(loaded.preprocessor.picture(photograph(64, 60)), "a")
    layout = image.picture.layout
    prompt = loaded.preprocessor.prompt(chat(1), [layout])
    reader = Reader()
    engine.submit(Request("one", prompt, [image], level, Sampling(max_tokens=4), reader, detail=True))
    drain(engine)
    receipt = reader.finished.receipt
    pictured = layout.visual_tokens - len(layout.newlines)
    kept = receipt.detail.kept_tokens
    newlines = [token for token in kept if token in layout.newlines]
    (point,) = engine.menu[level].operating_points
    assert receipt.visual_tokens == len(kept) == point.kept(pictured) + len(newlines)
    assert newlines == layout.newlines_of([token for token in kept if token not in layout.newlines])
    assert receipt.visual_tokens_total == layout.visual_tokens
    assert receipt.flops_ratio < 1
    route = Route(layout.visual_tokens, kept, (True,) * loaded.model.num_layers)
    assert receipt.flops_ratio == pytest.approx(flops_ratio(loaded.model.config, route, len(prompt)), abs=1e-4)


# ---- routes of tiles


def test_whole_tiles_may_go_and_their_newlines_with_them():
    """Equal to transformers' layers on all rows, those of the lower tile and of all newlines masked as keys."""
    config = config_of("qwen2", family="llava_next")
    reference, model = pair(config)
    layouts, pixels = pictures(config, [(64, 32)])
    (layout,) = layouts
    assert (layout.grid, layout.rows, layout.columns) == ((2, 1), 8, 4)
    kept = [token for token in range(16 + 4 * 5) if token not in layout.newlines and token % 3]
    kept = sorted([*kept, *layout.newlines_of(kept)])
    assert [token for token in kept if token in layout.newlines] == list(layout.newlines[:4])
    asked = Asked(model, layouts, pixels, kept)
    text = reference.model.language_model
    with torch.no_grad():
        hidden = text.embed_tokens(torch.tensor([asked.ids]))
        features = reference.model.get_image_features(**arguments(config, [(64, 32)], pixels), vision_feature_layer=-2,
                   vision_feature_select_strategy="default").pooler_output  # fmt: skip
        places = (torch.tensor(asked.ids) == IMAGE).nonzero()[:, 0]
        hidden[0, places] = torch.cat(list(features))
        seen = torch.ones(len(asked.ids), len(asked.ids), dtype=torch.bool).tril()
        dropped = places[[token for token in range(layout.visual_tokens) if token not in kept]]
        seen[:, dropped] = False
        seen[dropped, dropped] = True
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]
        for layer in text.layers:
            angles = text.rotary_emb(hidden, torch.arange(len(asked.ids))[None])
            hidden = layer(hidden, attention_mask=mask, position_embeddings=angles)
        expected = reference.lm_head(text.norm(hidden))[0, -1]
    torch.testing.assert_close(asked.logits(), expected, rtol=1e-4, atol=1e-4)


def test_pruning_packs_samples_of_tiled_pictures(tmp_path):
    """What pruning measures, on tiles that are encoded once, is what the whole model says."""
    source = open_transformers(write_hub(tmp_path / "next", hub_config("llava_next")), dtype="float32")
    turns = [("What color is it?", "red"), ("Where is it?", "left of it")]
    sample = pack(source.preprocessor, Sample(photograph(40, 90), turns))
    model = source.model.eval()
    with torch.no_grad():
        expected = model(**sample.inputs(model)).logits[0, sample.before_answers]
        found = model.lm_head(Divergence.from_dense(model, [sample]).references[0].hidden)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---- what does not fit


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llava_next", put("image_grid_pinpoints", value=[[32, 48]]), "[32, 48] is not a grid of tiles of 32 pixels"),
        ("llava_next", put("image_grid_pinpoints", value=[]), "image_grid_pinpoints is empty"),
        ("llava_next", put("vision_feature_select_strategy", value="full"), "17 tokens a tile"),
        ("llava_onevision", put("vision_feature_select_strategy", value="default"), "15 tokens a tile"),
        ("llava_onevision", put("vision_aspect_ratio", value="square"), "vision_aspect_ratio 'square'"),
    ],
)
def test_a_grid_of_tiles_that_does_not_fit_is_named(tmp_path, family, change, words):
    directory = write_hub(tmp_path / family, hub_config(family))
    edit(directory / "config.json", change)
    fails(directory, words, error=UnsupportedCheckpoint)


def test_other_grids_of_the_processor_are_refused(tmp_path):
    directory = write_hub(tmp_path / "next", hub_config("llava_next"))
    edit(directory / "preprocessor_config.json", put("image_grid_pinpoints", value=[[32, 64]]))
    fails(directory, "preprocessor_config.json", "differ")


def test_pictures_of_a_size_the_tower_does_not_take_are_refused(tmp_path):
    directory = write_hub(tmp_path / "onevision", hub_config("llava_onevision"))
    edit(directory / "preprocessor_config.json", put("size", value={"height": 64, "width": 64}))
    fails(directory, "64 x 64 pixels and the tower takes 32 x 32")


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
@pytest.mark.parametrize("size", [{"size": {"height": 10**6, "width": 10**6}}, {"crop_size": {"height": 10**6, "width": 32}}])
def test_enormous_pictures_are_refused_before_one_is_made(tmp_path, family, size):
    directory = write_hub(tmp_path / "enormous", hub_config(family))
    for name, value in size.items():
        edit(directory / "preprocessor_config.json", put(name, value=value))
    fails(directory, *size, "preprocessor_config.json", "1,000,000 pixels")


def test_enormous_grids_are_refused_before_one_is_made(tmp_path):
    directory = write_hub(tmp_path / "enormous", hub_config("llava_onevision"))
    for name in ("config.json", "preprocessor_config.json"):
        edit(directory / name, put("image_grid_pinpoints", value=[[32, 32], [320_000, 320_000]]))
    fails(directory, "image_grid_pinpoints", "320,000 pixels")


def test_a_family_that_is_not_supported_is_named(tmp_path):
    directory = write_hub(tmp_path / "other", hub_config("llava_next"))
    edit(directory / "config.json", put("architectures", value=["LlavaNextVideoForConditionalGeneration"]))
    fails(directory, "LlavaNextVideoForConditionalGeneration", "LlavaOnevisionForConditionalGeneration")


def test_no_router_is_trained_for_tiled_pictures(tmp_path):
    directory = write_hub(tmp_path / "next", hub_config("llava_next"))
    with pytest.raises(ValueError, match="a router reads pictures of one tile"):
        run(TrainingConfig(data="world"), directory, tmp_path / "out")


@pytest.mark.anyio
async def test_tiled_pictures_over_http(tmp_path):
    """The prompt's length is known before a picture is decoded; follow-ups start behind it; the detail names no owners."""
    engine = new_engine(load(write_hub(tmp_path / "next", hub_config("llava_next")), dtype="float32"))
    file = BytesIO()
    photograph(70, 150).save(file, "PNG")
    picture = {"type": "image_url", "image_url": {"url": data_url(file.getvalue())}}
    messages: list[dict[str, Any]] = [{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}]
    layout = engine.preprocessor.layout(70, 150)
    engine.start()
    transport = httpx.ASGITransport(app_of(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://espalier") as client:
        for level in ("off", "strong"):
            asked = {"messages": messages, "max_tokens": 3, "pruning": {"level": level, "detail": True}}
            reply = (await client.post("/v1/chat/completions", json=asked)).json()
            tokens = (await client.post("/tokenize", json={"messages": messages})).json()
            assert reply["usage"]["prompt_tokens"] == tokens["count"] > layout.visual_tokens
            assert reply["usage"]["image_tokens"] == layout.visual_tokens
            pruning = reply["pruning"]
            assert pruning["visual_tokens"] == len(pruning["detail"]["kept_tokens"])
            assert (pruning["visual_tokens"] == layout.visual_tokens) == (level == "off")
            assert pruning["detail"]["tiled"]
            assert pruning["detail"]["merged_into"] == {}
            again = (await client.post("/v1/chat/completions", json=asked)).json()
            assert again["choices"][0]["message"] == reply["choices"][0]["message"]
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    engine.stop()
