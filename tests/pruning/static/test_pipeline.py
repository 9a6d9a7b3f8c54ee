"""`espalier prune` on a tiny checkpoint: what comes out, what is refused, and what a kill leaves behind."""

from __future__ import annotations

import json
import resource
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from checkpoints.world import draw
from evals import inspect
from evals.exam import MAX_TOKENS, RecordedAnswer, make_request
from models.checkpoint import Checkpoint, load, open_transformers
from models.errors import CheckpointError
from models.manifest import read_manifest
from models.run_state import RunStateError
from pruning import samples
from pruning.answers import Prompt, generate
from pruning.samples import DataError
from pruning.static import held_out, pipeline, scores, search
from pruning.static.blocks import linears
from pruning.static.evolution import Evolution, EvolutionConfig
from pruning.static.packing import pack
from pruning.static.projector import TuningConfig
from pruning.static.recipe import Recipe, RecipeError, read
from tests.pruning.kills import Killed, die_at
from tests.pruning.rows import write_rows
from tests.server.tiny import VISUAL, answer, new_engine, write

QUICK: dict[str, Any] = {"samples": 4}
SEARCH: dict[str, Any] = {"allocation": "search", "samples": 16}


@pytest.fixture(scope="module", autouse=True)
def short_search() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "LEVELS", 2)
        patch.setattr(held_out, "PICTURES", 2)
        patch.setattr(search, "EVOLUTION", EvolutionConfig(generations=4, offspring=3))
        patch.setattr(search, "TUNING", TuningConfig(steps=3))
        yield


@pytest.fixture(scope="module", name="whole")
def never_stopped(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The manifest of a search that nobody stopped."""
    return prune(dense, tmp_path_factory.mktemp("whole") / "whole", **SEARCH)


def prune(dense: Path, out: Path, **given: Any) -> Any:
    return pipeline.run(read(None, {**QUICK, **given}), dense, out, quiet=True)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    return {name: linear.weight.detach() for name, linear in linears(model).items()}


def vision_tower(directory: Path) -> dict[str, torch.Tensor]:
    return LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).model.vision_tower.state_dict()


def zeros(found: dict[str, torch.Tensor]) -> float:
    return sum(int((w == 0).sum()) for w in found.values()) / sum(w.numel() for w in found.values())


# ---- what comes out


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obs", "alps"])
@pytest.mark.parametrize("allocation", ["uniform", "ecoflap", "owl"])
def test_the_total_is_exact_and_the_vision_tower_is_left_alone(dense, tmp_path, criterion, allocation):
    options = {"score": "fo"} if allocation == "ecoflap" else {}
    manifest = prune(dense, tmp_path / "out", criterion=criterion, allocation=allocation, sparsity=0.6, **options)
    after = weights(tmp_path / "out")
    assert zeros(after) == pytest.approx(0.6, abs=1e-4)
    assert manifest.pruning.sparsity == {name: pytest.approx(zeros({name: w}), abs=1e-5) for name, w in after.items()}
    vision, before = vision_tower(tmp_path / "out"), vision_tower(dense)
    assert all(torch.equal(vision[name], before[name]) for name in before)
    assert len({round(s, 3) for s in manifest.pruning.sparsity.values()}) == 1 or allocation != "uniform"


def test_two_of_every_four_are_zero(dense, tmp_path):
    prune(dense, tmp_path / "out", pattern="2:4")
    for weight in weights(tmp_path / "out").values():
        assert ((weight.view(len(weight), -1, 4) == 0).sum(2) == 2).all()


def test_zeroth_order_scores_leave_the_weights_as_they_were(dense, tmp_path):
    manifest = prune(dense, tmp_path / "out", allocation="ecoflap", score="zo", criterion="magnitude")
    before, after = weights(dense), weights(tmp_path / "out")
    assert all(torch.equal(before[name][after[name] != 0], w[w != 0]) for name, w in after.items())
    assert max(manifest.pruning.sparsity.values()) <= 0.6 + 1e-3


def test_zeroth_order_scores_are_loss_differences(dense):
    source = open_transformers(dense)
    packed = [pack(source.preprocessor, sample) for sample in samples.read(samples.WORLD, 2, 0)]
    found = dict(scores.zeroth_order(source.model, packed, 0, known=["language.0.mlp.up_proj"]))
    assert found.keys() == linears(source.model).keys() - {"language.0.mlp.up_proj"}
    name = "language.1.mlp.down_proj"
    weight, generator, wanted = linears(source.model)[name].weight, torch.Generator().manual_seed(crc32(f"0/{name}".encode())), 0.0
    with torch.no_grad():
        for sample in packed:
            step = scores.EPSILON * torch.randn(weight.shape, generator=generator)
            sides = []
            for moved in (weight + step, weight - step):
                source.model.get_submodule("model.language_model.layers.1.mlp.down_proj").weight.data = moved
                sides.append(scores.answer_loss(source.model, sample))
            wanted += float((sides[0] - sides[1]).abs()) / (2 * scores.EPSILON)
    assert found[name] == pytest.approx(wanted, rel=1e-2)  # a small difference of float32 losses


def test_search_hits_the_total_and_tells_its_story(dense, tmp_path):
    manifest = prune(dense, tmp_path / "out", **SEARCH)
    assert zeros(weights(tmp_path / "out")) == pytest.approx(0.5, abs=1e-4)
    assert len(manifest.pruning.search) == 4
    assert [turn["generation"] for turn in manifest.pruning.projector] == [2, 4]
    assert all(turn["accepted"] == (turn["after"] < turn["before"]) for turn in manifest.pruning.projector)
    assert set(manifest.pruning.notes["divergence"]) == {"sequential", "database"}


def test_structured_makes_matrices_smaller_and_the_total_holds(dense, tmp_path):
    manifest = prune(dense, tmp_path / "out", pattern="structured", sparsity=0.4)
    before = sum(linear.numel() for linear in weights(dense).values())
    model = load(tmp_path / "out", dtype="float32").model
    after = sum(linear.size for name, linear in model.linears().items() if name.startswith("language"))
    assert after == pytest.approx(0.6 * before, rel=0.1)  # units of a matrix this small are large
    lost = sum(sparsity * weights(dense)[name].numel() for name, sparsity in manifest.pruning.sparsity.items())
    assert lost == pytest.approx(before - after, rel=1e-3)
    engine = new_engine(load(tmp_path / "out", dtype="float32"))
    assert answer(engine, 0).finished.receipt.visual_tokens == VISUAL


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_it_serves_with_the_answers_that_transformers_gives(dense, tmp_path, pattern):
    prune(dense, tmp_path / "out", pattern=pattern)
    checkpoint = load(tmp_path / "out", dtype="float32")
    source = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    engine = new_engine(checkpoint)
    for index in range(4):
        scene = draw("test", index)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": scene.questions[0].text}]}]
        ids = torch.tensor([checkpoint.preprocessor.prompt(messages)])
        pixels = checkpoint.preprocessor.picture(scene.image).pixels
        expected = source.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=MAX_TOKENS, do_sample=False)
        ours = RecordedAnswer()
        engine.submit(make_request(checkpoint.preprocessor, index, scene.image, scene.questions[0].text, "off", ours))
        while not engine.scheduler.idle:
            engine.step()
        said = checkpoint.preprocessor.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
        assert ours.text.strip() == said.strip()


def test_a_bfloat16_checkpoint_stays_one(dense, tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(dense, dtype=torch.bfloat16)
    shutil.copytree(dense, tmp_path / "half")
    model.save_pretrained(tmp_path / "half")
    prune(tmp_path / "half", tmp_path / "out", **SEARCH)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}
    assert zeros(weights(tmp_path / "out")) == pytest.approx(0.5, abs=1e-4)


def test_a_read_only_checkpoint_makes_a_writable_one(tmp_path):
    """So are the files under DVC or git-annex. The configuration and the index are written anew."""
    source = write(tmp_path / "dense", max_shard_size="100KB")
    for path in source.iterdir():
        path.chmod(0o444)
    prune(source, tmp_path / "out", pattern="structured", sparsity=0.4)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.stat().st_mode & stat.S_IWUSR] == []


def test_the_same_seed_makes_the_same_checkpoint(dense, whole, tmp_path):
    assert prune(dense, tmp_path / "again", **SEARCH).files == whole.files
    assert prune(dense, tmp_path / "c", **SEARCH, seed=1).files != whole.files


def test_calibration_data_may_come_from_files_in_both_formats(dense, tmp_path):
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "red"}]
    data = write_rows(tmp_path, range(4))
    with open(data, "a") as file:
        file.writelines("\n" + json.dumps({"image": f"{number}.png", "conversations": talk}) for number in range(3))
    prune(dense, tmp_path / "out", data=data)
    assert zeros(weights(tmp_path / "out")) == pytest.approx(0.5, abs=1e-4)


# ---- what it cost


def test_the_cost_is_told_on_rows_that_calibration_did_not_see(dense, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(held_out, "PICTURES", 10)
    prunes = {share: prune(dense, tmp_path / str(share), sparsity=share).pruning.held_out for share in (0.001, 0.6)}
    little, much = prunes[0.001], prunes[0.6]
    assert little.questions == much.questions == 10
    assert little.dense_perplexity == much.dense_perplexity < little.perplexity * 1.01 < much.perplexity
    assert 0.9 <= little.agreement <= 1 and much.agreement < little.agreement
    models = [load(path) for path in (dense, tmp_path / "0.6")]
    rest = samples.read_rest(samples.WORLD, 10, QUICK["samples"], 0)
    said = [
        [answer for batch in held_out._batches(one, rest, 0, Console(quiet=True), "") for answer in ask(one, batch)]
        for one in models
    ]
    assert much.agreement == sum(map(list.__eq__, *said)) / 10
    inspect.run(tmp_path / "0.6")
    assert f"10 held-out questions: {much.agreement:.1%} (" in capsys.readouterr().out


def ask(checkpoint: Checkpoint, prompts: list[Prompt]) -> list[list[int]]:
    with torch.inference_mode():
        return generate(checkpoint.model, prompts, checkpoint.eos, held_out.MOST_TOKENS)


def test_data_without_rows_to_spare_tells_no_cost(dense, tmp_path):
    for count, asked in ((4, None), (5, 1)):
        data = write_rows(tmp_path, [*range(count), *range(count)])
        found = prune(dense, tmp_path / f"out-{count}", data=data).pruning.held_out
        assert (found and found.questions) == asked
    assert "held_out" not in (tmp_path / "out-4" / "espalier.json").read_text()


# ---- kills


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [(pipeline, "pruned_weights", 3), (Evolution, "step", 4), (search, "tune", 2), (pipeline, "derive", 1)],
)
def test_a_killed_run_repeats_nothing_that_was_finished(dense, whole, tmp_path, monkeypatch, owner, name, calls):
    with monkeypatch.context() as patch:
        die_at(patch, owner, name, calls)
        with pytest.raises(Killed):
            prune(dense, tmp_path / "out", **SEARCH)
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        again = die_at(patch, owner, name, -1)
        assert prune(dense, tmp_path / "out", **SEARCH).files == whole.files
    total = {"pruned_weights": 3, "step": 4, "tune": 2, "derive": 1}[name]
    assert again[0] == total - (calls - 1)
    assert not list(tmp_path.glob("*.work")) and not list(tmp_path.glob("*.part"))


def test_a_run_killed_while_it_was_completed_goes_on_there(dense, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_at(patch, pipeline.layer_importance, "calibrate", 1)
        with pytest.raises(Killed):
            prune(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = die_at(monkeypatch, pipeline, "derive", -1)
    calibration = prune(dense, tmp_path / "out").calibration
    assert (calibration.data, calibration.samples, calibration.seed) == ("world", QUICK["samples"], 0)
    assert again == [0] and {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_killed_structured_run_goes_on_too(dense, tmp_path, monkeypatch):
    recipe: dict[str, Any] = {"pattern": "structured", "sparsity": 0.4}
    whole = prune(dense, tmp_path / "whole", **recipe)
    with monkeypatch.context() as patch:
        die_at(patch, pipeline.structured.BlockRemovals, "apply", 3)
        with pytest.raises(Killed):
            prune(dense, tmp_path / "out", **recipe)
    with monkeypatch.context() as patch:
        again = die_at(patch, pipeline.structured.BlockRemovals, "apply", -1)
        assert prune(dense, tmp_path / "out", **recipe).files == whole.files
    assert again == [1]


def test_another_recipe_does_not_go_on_with_a_killed_run(dense, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_at(patch, pipeline, "pruned_weights", 2)
        with pytest.raises(Killed):
            prune(dense, tmp_path / "out")
    with pytest.raises(RunStateError, match=r"out\.work holds an unfinished run of another recipe"):
        prune(dense, tmp_path / "out", sparsity=0.7)


def test_what_a_removal_cut_short_has_left_of_a_run_is_not_used(dense, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_at(patch, pipeline, "pruned_weights", 3)
        with pytest.raises(Killed):
            prune(dense, tmp_path / "out", criterion="magnitude", sparsity=0.9)
    (tmp_path / "out.work" / "recipe.json").unlink()
    assert list((tmp_path / "out.work").glob("block-*"))
    with pytest.raises(RunStateError, match="holds files and no recipe"):
        prune(dense, tmp_path / "out", criterion="magnitude", sparsity=0.5)
    assert list((tmp_path / "out.work").glob("block-*")), "it may be somebody's"


# ---- what is refused, before any work


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 1.0}, "sparsity: Input should be less than 1"),
        ({"sparsity": 0.0}, "sparsity 0 prunes nothing, unless tower is above 0"),
        ({"sparsity": -0.1}, "sparsity: Input should be greater than or equal to 0"),
        ({"samples": 1}, "samples: Input should be greater than or equal to 4"),
        ({"samples": 8, "allocation": "search"}, "allocation search needs samples 16 or more"),
        ({"pattern": "4:8"}, "pattern: Input should be 'unstructured', '2:4' or 'structured'"),
        ({"pattern": "2:4", "sparsity": 0.6}, "pattern 2:4 means sparsity 0.5"),
        ({"pattern": "2:4", "allocation": "ecoflap"}, "pattern 2:4 needs allocation uniform"),
        ({"pattern": "structured", "criterion": "alps"}, "structured needs obs, wanda or magnitude"),
        ({"pattern": "structured", "allocation": "search"}, "pattern structured needs allocation uniform"),
        ({"criterion": "sparsegpt"}, "criterion: Input should be 'magnitude', 'wanda', 'obs' or 'alps'"),
        ({"score": "fo"}, "score needs allocation ecoflap"),
        ({"allocation": "ecoflap", "eta": 0.0}, "eta needs allocation search"),
        ({"sparsty": 0.5}, "sparsty: Extra inputs are not permitted"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_by_name(given, message):
    with pytest.raises(RecipeError, match=message):
        read(None, given)


def test_a_recipe_file_is_read_and_flags_win(tmp_path):
    (tmp_path / "recipe.toml").write_text('sparsity = 0.6\ncriterion = "wanda"\n')
    assert read(tmp_path / "recipe.toml", {"criterion": "obs"}) == Recipe(sparsity=0.6, criterion="obs")
    (tmp_path / "recipe.toml").write_text("sparsity = ")
    with pytest.raises(RecipeError, match=r"recipe\.toml: "):
        read(tmp_path / "recipe.toml", {})


def test_paths_and_families_that_cannot_be_used_are_refused(dense, tmp_path):
    with pytest.raises(RecipeError, match="exists; name a directory that does not"):
        prune(dense, tmp_path)
    with pytest.raises(RecipeError, match="is not a directory; create it first"):
        prune(dense, tmp_path / "no" / "out")
    with pytest.raises(RecipeError, match=r"families: faces is not one of shapes"):
        prune(dense, tmp_path / "out", families=["faces"])
    with pytest.raises(DataError, match=r"data: nowhere\.jsonl is not a file"):
        prune(dense, tmp_path / "out", data="nowhere.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_pruned_checkpoint_is_not_pruned_again(dense, tmp_path):
    prune(dense, tmp_path / "once", criterion="magnitude")
    with pytest.raises(RecipeError, match="is pruned already; prune the dense checkpoint"):
        prune(tmp_path / "once", tmp_path / "twice")


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(CheckpointError, match="LlamaForCausalLM is not one of LlavaForConditionalGeneration"):
        prune(tmp_path / "other", tmp_path / "out")


def test_a_full_disk_is_found_before_the_work(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(RecipeError, match=r"GB free and up to .* GB are needed; make room"):
        prune(dense, tmp_path / "out")


def test_a_disk_that_fills_up_leaves_nothing_half_written(dense, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("models.saving.save_file", lambda *args, **named: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            prune(dense, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out.work"}
    prune(dense, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_limit_on_file_sizes_is_an_error_of_the_disk(dense, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))
    try:
        with pytest.raises(OSError, match=r"block-language\.0\.part cannot be written: .*File too large"):
            prune(dense, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in (tmp_path / "out.work").iterdir()} == {"recipe.json"}


def test_a_hessian_that_overflows_names_the_matrix(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("pruning.static.obs.accumulate", lambda statistics, rows: statistics.matrix.fill_(float("nan")))
    with pytest.raises(ValueError, match=r"language\.0\.self_attn\.q_proj: the Hessian is not finite"):
        prune(dense, tmp_path / "out")


@pytest.mark.parametrize("line", ["{", '{"image": "none.png", "question": "?", "answer": "!"}', '{"question": "?"}', "[]"])
def test_data_that_cannot_be_read_names_its_line(dense, tmp_path, line):
    (tmp_path / "data.jsonl").write_text("\n" + "\n".join(line.replace("none", f"none-{number}") for number in range(4)))
    with pytest.raises(DataError, match=r"data\.jsonl, line \d: "):
        prune(dense, tmp_path / "out", data=str(tmp_path / "data.jsonl"))
    (tmp_path / "data.jsonl").write_text('{"image": "none.png", "question": "?", "answer": "!"}')
    with pytest.raises(DataError, match="has 1 pictures and 4 are asked for"):
        prune(dense, tmp_path / "out", data=str(tmp_path / "data.jsonl"))
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl"}


def test_a_corrupt_manifest_names_its_key(dense, tmp_path):
    prune(dense, tmp_path / "out", criterion="magnitude")
    path = tmp_path / "out" / "espalier.json"
    document = json.loads(path.read_text())
    document["pruning"]["sparsity"] = "half"
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"pruning\.sparsity: Input should be"):
        read_manifest(tmp_path / "out")


def test_a_projector_that_held_out_samples_dislike_is_put_back(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "TUNING", TuningConfig(steps=4, learning_rate=1.0))
    manifest = prune(dense, tmp_path / "out", **SEARCH)
    assert not any(turn["accepted"] for turn in manifest.pruning.projector)
    before, after = (LlavaForConditionalGeneration.from_pretrained(path) for path in (dense, tmp_path / "out"))
    for name, value in before.model.multi_modal_projector.state_dict().items():
        assert torch.equal(after.model.multi_modal_projector.state_dict()[name], value)
