"""`espalier finetune` on a tiny checkpoint: what is learned, what stays zero, what is refused, and what a kill leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from models.checkpoint import load, open_transformers
from models.errors import CheckpointError
from models.manifest import read_manifest, write_manifest
from models.run_state import RunStateError
from pruning import samples
from pruning.answers import Prompt, log_probabilities
from pruning.dynamic.levels import OperatingPoint
from pruning.dynamic.planner import make_route
from pruning.finetuning import train
from pruning.finetuning.config import FinetuneConfig
from pruning.finetuning.levels import RATIOS, shown
from pruning.finetuning.train import FinetuneError, Finetuning
from pruning.samples import DataError
from pruning.static import held_out, pipeline
from pruning.static.blocks import linears
from pruning.static.fitness import Divergence, answer_rows, image_features
from pruning.static.packing import pack
from pruning.static.recipe import RecipeError, read
from pruning.static.scores import answer_loss
from tests.pruning.kills import Killed, die_at
from tests.pruning.rows import write_rows
from tests.server.tiny import answer, new_engine, write

QUICK: dict[str, Any] = {"samples": 32, "batch_size": 4, "rank": 4, "learning_rate": 0.02}


@pytest.fixture(scope="module", name="pruned", params=["unstructured", "2:4", "structured"])
def pruned_checkpoint(request: pytest.FixtureRequest, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "pruned"
    recipe = read(None, {"samples": 4, "pattern": request.param, "sparsity": 0.5, "criterion": "wanda"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "PICTURES", 2)
        pipeline.run(recipe, dense, out, quiet=True)
    return out


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "PICTURES", 2)


def tune(checkpoint: Path, out: Path, teacher: Path | None = None, dtype: str = "auto", **given: Any) -> Any:
    return train.run(FinetuneConfig(**QUICK | given), checkpoint, out, teacher, dtype=dtype, quiet=True)


def matrices(directory: Path) -> dict[str, torch.Tensor]:
    return {name: linear.weight for name, linear in linears(open_transformers(directory).model).items()}


def divergence(directory: Path, dense: Path) -> float:
    """From the dense checkpoint, on pictures that no run is trained on."""
    teacher, student = open_transformers(dense), open_transformers(directory)
    packed = [pack(teacher.preprocessor, sample) for sample in samples.read(samples.WORLD, 8, 99)]
    with torch.no_grad():
        return float(Divergence(student.model, Divergence.from_dense(teacher.model, packed).references)(range(8)).mean())


def test_a_pruned_model_comes_closer_to_its_teacher(pruned, dense, tmp_path):
    manifest = tune(pruned, tmp_path / "out", dense)
    assert divergence(tmp_path / "out", dense) < 0.9 * divergence(pruned, dense)
    assert manifest.finetuning["loss"][-1] < manifest.finetuning["loss"][0]
    assert manifest.pruning.held_out.questions == 2
    assert manifest.pruning.held_out != read_manifest(pruned).pruning.held_out


def test_what_is_zero_stays_zero_and_the_rest_learns(pruned, dense, tmp_path):
    tune(pruned, tmp_path / "out", dense)
    before, after = matrices(pruned), matrices(tmp_path / "out")
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    engine = new_engine(load(tmp_path / "out", dtype="float32"))
    assert answer(engine, 0).finished.receipt.visual_tokens


@pytest.mark.parametrize(("steps", "left"), [(1, 0.98), (8, 0.95), (10, 0.95)])
def test_without_a_teacher_the_answers_are_learned(dense, tmp_path, steps, left):
    tune(dense, tmp_path / "out", samples=steps * QUICK["batch_size"])
    losses = []
    for directory in (dense, tmp_path / "out"):
        source = open_transformers(directory)
        packed = [pack(source.preprocessor, sample) for sample in samples.read(samples.WORLD, 8, 99)]
        with torch.no_grad():
            losses.append(sum(float(answer_loss(source.model, sample)) for sample in packed))
    assert losses[1] < left * losses[0]


def test_its_own_rows_are_learned_over_and_over(dense, tmp_path):
    losses = tune(dense, tmp_path / "out", data=write_rows(tmp_path, range(4)), samples=4, epochs=30).finetuning["loss"]
    assert losses[-1] < 0.7 * losses[0]


def test_what_it_cost_is_asked_about_pictures_that_no_run_saw(dense, tmp_path, monkeypatch):
    data = write_rows(tmp_path, [*range(12), *range(12)])
    asked: list[bytes] = []
    monkeypatch.setattr(held_out, "cost", lambda dense, state, rest, *_: asked.extend(one.image.tobytes() for one in rest))
    monkeypatch.setattr(held_out, "PICTURES", 12)
    recipe = read(None, {"samples": 4, "criterion": "magnitude", "seed": 1, "data": data})
    pipeline.run(recipe, dense, tmp_path / "half", quiet=True)
    assert len(asked) == 8
    asked.clear()
    tune(tmp_path / "half", tmp_path / "out", dense, data=data, samples=4)
    seen = {one.image.tobytes() for seed in (0, 1) for one in samples.read(data, 4, seed)}
    assert len(asked) == 12 - len(seen) and seen.isdisjoint(asked)


def test_drawings_of_every_epoch_of_every_run_are_not_held_out(dense, tmp_path, monkeypatch):
    asked: list[bytes] = []
    monkeypatch.setattr(held_out, "cost", lambda dense, state, rest, *_: asked.extend(one.image.tobytes() for one in rest))
    manifest = pipeline.run(read(None, {"samples": 4, "criterion": "magnitude", "seed": 9}), dense, tmp_path / "half", quiet=True)
    once = {"data": samples.WORLD, "samples": 8, "seed": 0, "epochs": 2}
    write_manifest(tmp_path / "half", manifest.model_copy(update={"finetuning": once}))
    tune(tmp_path / "half", tmp_path / "twice", dense, samples=4, seed=1)
    tune(tmp_path / "twice", tmp_path / "again", dense, samples=4)
    learned = {one.image.tobytes() for seed in (0, 1) for one in samples.read(samples.WORLD, 8, seed)}
    assert len(set(asked)) == 6 and learned.isdisjoint(asked)


@pytest.mark.parametrize("saved", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_teacher_may_be_saved_in_another_dtype(dense, tmp_path, saved):
    directory = dense
    for name in saved:
        directory = shutil.copytree(directory, tmp_path / name)
        LlavaForConditionalGeneration.from_pretrained(directory, dtype=name).save_pretrained(directory)
    assert len(tune(directory, tmp_path / "out", tmp_path / saved[0], samples=4).finetuning["loss"]) == 1
    assert open_transformers(tmp_path / "out").model.dtype == getattr(torch, saved[1])


@pytest.mark.parametrize("steps", [1, 9, 10, 19, 25, 100])
def test_each_tenth_of_the_steps_counts(steps):
    losses = [float(step) for step in range(steps)]
    found = train.tenths(losses)
    assert len(found) == min(10, steps) and found == sorted(found)
    assert found[0] == sum(losses[: -(-steps // 10)]) / -(-steps // 10) and found[-1] >= steps - max(1, steps / 10)


def test_a_killed_run_goes_on_to_the_same_weights(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 3)
    whole = tune(dense, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, Finetuning, "_step", 5)
        tune(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    steps = die_at(monkeypatch, Finetuning, "_step", 99)
    assert tune(dense, tmp_path / "out").files == whole.files
    assert steps == [8 - 3]


def test_a_run_that_diverges_says_so_each_time(dense, tmp_path, monkeypatch):
    """Also where it goes on from what it saved."""
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    for _ in range(2):
        with pytest.raises(FinetuneError, match="not finite at step 2; lower --learning-rate"):
            tune(dense, tmp_path / "out", learning_rate=1e30)
    with pytest.raises(FinetuneError, match="not finite at step 1; lower --learning-rate"):
        tune(dense, tmp_path / "last", dtype="float16", samples=4, learning_rate=1e6)


def test_transformers_reads_what_was_trained(dense, tmp_path):
    tune(dense, tmp_path / "out", samples=4)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert all(torch.equal(linear.weight, matrices(tmp_path / "out")[name]) for name, linear in linears(model).items())


def test_bad_input_is_refused_before_the_work(dense, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(RecipeError, match="there exists; name a directory that does not"):
        tune(dense, tmp_path / "there")
    with pytest.raises(RecipeError, match="is not a directory; create it first"):
        tune(dense, tmp_path / "no" / "out")
    with pytest.raises(FinetuneError, match="3 samples fill no batch of 4"):
        tune(dense, tmp_path / "out", samples=3)
    with pytest.raises(DataError, match="is not a file"):
        tune(dense, tmp_path / "out", data="nothing.jsonl")
    with pytest.raises(CheckpointError):
        tune(dense, tmp_path / "out", tmp_path / "there")
    other = write(tmp_path / "other")
    model = LlavaForConditionalGeneration.from_pretrained(other, dtype=torch.float32)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(other)
    with pytest.raises(FinetuneError, match="other has another head"):
        tune(dense, tmp_path / "out", other)


def test_another_run_in_the_same_place_is_refused(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, Finetuning, "_step", 2)
        tune(dense, tmp_path / "out")
    with pytest.raises(RunStateError, match="unfinished run of another recipe"):
        tune(dense, tmp_path / "out", rank=2)


@pytest.mark.parametrize("level", ["off", "balanced", "strong"])
def test_a_level_shows_what_the_server_shows_there(dense, level):
    source, served = open_transformers(dense, dtype="float32"), load(dense, dtype="float32")
    [one] = samples.read(samples.WORLD, 1, 5)
    question, said = one.turns[0]
    sample = pack(source.preprocessor, samples.Sample(one.image, [(question, said)]))
    with torch.no_grad():
        given = shown(source.model, sample, image_features(source.model, sample), level)
        logits = source.model.lm_head(answer_rows(source.model, given.inputs, given.before_answers))
    picture = served.preprocessor.picture(one.image)
    point = OperatingPoint(visual_ratio=RATIOS[level])
    with torch.inference_mode():
        image = served.model.encode(picture.pixels, picture.layout)
        route, visual = make_route(point, [image], served.model.num_layers, None)
        prompt = Prompt(served.preprocessor.question(question, layout=picture.layout), visual)
        answer = sample.ids[sample.answers].tolist()
        [expected] = log_probabilities(served.model, [prompt], [answer], [route])
    torch.testing.assert_close(logits.log_softmax(-1), expected.float(), atol=1e-4, rtol=1e-4)
