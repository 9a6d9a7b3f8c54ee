"""A router's training as a whole: what the manifest says of it, kills, other data and refusals."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from checkpoints.shipped import SHIPPED
from evals.inspect import questions_told
from models.checkpoint import load
from models.manifest import read_manifest, write_manifest
from models.run_state import RunStateError
from pruning.dynamic.levels import AUTO
from pruning.dynamic.planner import Planner, load_menu
from pruning.dynamic.router import RouterConfig
from pruning.dynamic.router_file import RouterRecord
from pruning.dynamic.training import dataset, loop, profile, train
from pruning.dynamic.training.agreement import BUDGETS
from pruning.dynamic.training.config import TrainingConfig
from pruning.dynamic.training.train import run
from pruning.samples import DataError
from tests.pruning.dynamic.tiny_router import POINTS, QUICK, plain_checkpoint, routed_checkpoint  # noqa: F401
from tests.pruning.kills import Killed, die_at


def test_the_manifest_says_what_was_measured(routed):
    record = RouterRecord.of(read_manifest(routed))
    assert record.config.operating_points == POINTS
    assert record.training == TrainingConfig(**QUICK, data="world").model_dump(), "what the checkpoint was trained on"
    costs = [point.cost for point in record.operating_points]
    assert len(costs) == POINTS + 1
    assert costs == sorted(costs)
    assert record.operating_points[-1].agreement == 1.0, "the whole model agrees with itself"
    assert set(record.levels) == {*BUDGETS, AUTO}
    held_out = QUICK["pictures"] // 3
    for level in record.levels.values():
        for found, each in ((level.first, QUICK["questions"]), (level.follow_up, QUICK["questions"] - 1)):
            assert found.questions == each * held_out
            assert 0 <= found.agreement <= 1
    taught = QUICK["pictures"] - held_out
    assert record.report["questions"] == QUICK["questions"] * taught + (2 * QUICK["questions"] - 1) * held_out
    assert questions_told(record.report) == f"trained on {QUICK['questions'] * taught} questions"
    shipped = RouterRecord.of(read_manifest(SHIPPED["embedded"]))
    assert questions_told(shipped.report) == "trained and measured on 15000 questions"
    assert record.report["explained_variance"].keys() == {"token_scores", "layer_scores"}
    assert len(record.report["area_under_roc"]) == POINTS


@pytest.mark.parametrize(
    ("owner", "name", "call", "left"),
    [(dataset, "_collect", 2, 1), (train, "score_loss", 25, 10), (train, "distillation_loss", 12, 10), (profile, "measure", 1, 1),
     (train, "derive", 1, 1)],
)  # fmt: skip
def test_a_killed_run_ends_as_one_that_never_stopped(plain, routed, tmp_path, monkeypatch, owner, name, call, left):
    out = tmp_path / "new" / "out"
    monkeypatch.setattr(loop, "SAVE_EVERY", 10)
    with monkeypatch.context() as patch:
        die_at(patch, owner, name, call)
        with pytest.raises(Killed):
            run(TrainingConfig(**QUICK), plain, out, quiet=True)
    assert not out.exists()
    again = die_at(monkeypatch, owner, name, -1)
    run(TrainingConfig(**QUICK), plain, out, quiet=True)
    assert again[0] == left
    assert read_manifest(out).files == read_manifest(routed).files
    assert {path.name for path in out.parent.iterdir()} == {"out"}


def test_a_router_fits_the_files_that_are_written(plain, tmp_path):
    """The weights of some checkpoints have another header, as files that are not transformers' do."""
    source = tmp_path / "source"
    shutil.copytree(plain, source)
    write_manifest(source, read_manifest(plain).model_copy(update={"files": {}}))
    save_file(load_file(plain / "model.safetensors"), source / "model.safetensors", metadata={"format": "pt", "by": "somebody"})
    run(TrainingConfig(**QUICK | {"steps": 2, "corrector_steps": 0}), source, tmp_path / "out", quiet=True)
    assert Planner(load(tmp_path / "out")).router is not None


@pytest.mark.parametrize("width", [8, 4096])
def test_the_whole_model_is_the_last_point(plain, width):
    """Though it is not the dearest, where the router is larger than the model."""
    source = load(plain)
    config = RouterConfig(source.model.config.text_config.hidden_size, source.model.num_layers, width, operating_points=POINTS)
    *others, last = profile.operating_points(source, config, 8)
    assert (last.visual_ratio, last.skipped_layers, last.frozen_layers) == (1.0, 0, 0)
    assert (max(point.cost for point in others) > last.cost) == (width == 4096)


def test_another_config_does_not_go_on_with_a_killed_run(plain, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_at(patch, dataset, "_collect", 2)
        with pytest.raises(Killed):
            run(TrainingConfig(**QUICK), plain, tmp_path / "out", quiet=True)
    with pytest.raises(RunStateError, match="unfinished run of another recipe"):
        run(TrainingConfig(**QUICK, seed=1), plain, tmp_path / "out", quiet=True)


def test_another_calibration_does_not_go_on_with_a_killed_run(plain, tmp_path, monkeypatch):
    """It names other layers to skip than those without which the answers were measured."""
    source = shutil.copytree(plain, tmp_path / "source")
    with monkeypatch.context() as patch:
        die_at(patch, train, "derive", 1)
        with pytest.raises(Killed):
            run(TrainingConfig(**QUICK), source, tmp_path / "out", quiet=True)
    manifest = read_manifest(source)
    measured = manifest.calibration.model_copy(update={"layer_change": [0.2, 0.3, 1.0]})
    for calibration in (measured, None):
        write_manifest(source, manifest.model_copy(update={"calibration": calibration}))
        with pytest.raises(RunStateError, match=r"unfinished run of another recipe, checkpoint or calibration"):
            run(TrainingConfig(**QUICK), source, tmp_path / "out", quiet=True)


def test_it_learns_from_a_file_without_answers(plain, tmp_path):
    lines = []
    for number in range(8):
        shutil.copy("docs/samples/sign.png", tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": "What is written?"}))
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(lines))
    config = TrainingConfig(data=str(data), pictures=8, questions=1, answer_tokens=3, steps=2, corrector_steps=2, batch_size=2)
    record = RouterRecord.of(run(config, plain, tmp_path / "out", quiet=True))
    assert (record.report["questions"], record.report["learned_questions"]) == (8, 6)
    assert record.levels[AUTO].follow_up is None and load_menu(load(tmp_path / "out"))[AUTO].follow_up_cost_weight == 0
    with pytest.raises(DataError, match="has 8 pictures and 9 are asked for"):
        run(config.model_copy(update={"pictures": 9}), plain, tmp_path / "more", quiet=True)


def test_what_cannot_be_done_is_said_before_the_work(plain, tmp_path):
    with pytest.raises(ValueError, match="exists; name a directory that does not"):
        run(TrainingConfig(), plain, tmp_path, quiet=True)
    with pytest.raises(ValueError, match=r"none\.jsonl is not a file"):
        run(TrainingConfig(data="none.jsonl"), plain, tmp_path / "out", quiet=True)


@pytest.mark.parametrize("rate", ["learning_rate", "corrector_learning_rate"])
def test_training_that_diverges_is_told(plain, tmp_path, rate):
    with pytest.raises(ValueError, match=r"not finite at step \d+; lower its learning rate"):
        run(TrainingConfig(**QUICK | {rate: 1e30}), plain, tmp_path / "out", quiet=True)
