"""The commands as a person runs them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image
from pydantic import BaseModel
from typer import Exit
from typer.testing import CliRunner

from espalier import _plain_errors, app, errors
from models.manifest import Manifest, read_manifest, write_manifest
from pruning.dynamic.training.config import TrainingConfig
from pruning.finetuning.config import FinetuneConfig
from pruning.static.recipe import Recipe
from server.settings import Settings
from tests.server.tiny import write

COMMAND = [sys.executable, "-m", "espalier", "prune"]


@pytest.fixture(scope="module", name="dense")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dense") / "dense")


def test_prune_by_recipe_and_flags_then_inspect_with_a_picture(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('criterion = "wanda"\nsparsity = 0.6\nsamples = 4\n')
    out = tmp_path / "out"
    asked = ["prune", str(dense), "--out", str(out), "--recipe", str(tmp_path / "recipe.toml"), "--sparsity", "0.7"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    manifest = read_manifest(out)
    assert manifest.pruning is not None and manifest.calibration is not None
    assert (manifest.pruning.recipe["criterion"], manifest.pruning.recipe["sparsity"]) == ("wanda", 0.7)
    shown = CliRunner().invoke(app, ["inspect", str(out), "--picture", str(tmp_path / "picture.png")])
    assert shown.exit_code == 0, shown.output
    assert "wanda, unstructured, sparsity 0.7" in shown.output
    assert "70.0%" in shown.output
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 400


def test_pruning_says_that_the_router_stays_behind(dense: Path, tmp_path: Path) -> None:
    routed = tmp_path / "routed"
    shutil.copytree(dense, routed)
    write_manifest(routed, read_manifest(routed).model_copy(update={"router": {"config": {}}}))
    result = CliRunner().invoke(app, ["prune", str(routed), "--out", str(tmp_path / "out"), "--samples", "4"])
    assert result.exit_code == 0, result.output
    assert f"train one with `espalier route {tmp_path / 'out'} --out DIR`" in result.output
    assert read_manifest(tmp_path / "out").router is None


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["--sparsity", "1.5"], 1, "sparsity: Input should be less than 1"),
        (["--allocation", "random"], 2, "'random' is not one of 'uniform', 'ecoflap', 'owl', 'search'"),
        (["--ray", "auto"], 1, "--ray spreads the evaluations of a search"),
        (["--recipe", "none.toml"], 1, "none.toml"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(
    dense: Path, tmp_path: Path, given: list[str], code: int, message: str
) -> None:
    result = CliRunner().invoke(app, ["prune", str(dense), "--out", str(tmp_path / "out"), *given])
    assert result.exit_code == code
    assert message in result.output and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_calibrate_shows_and_stores_each_layers_change(dense: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "copy"))
    result = CliRunner().invoke(app, ["calibrate", str(directory), "--samples", "2", "--seed", "5"])
    assert result.exit_code == 0, result.output
    assert "layer  0" in result.output and "copy" in result.output
    calibration = read_manifest(directory).calibration
    assert calibration is not None and (calibration.samples, calibration.seed) == (2, 5)


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [
        ("finetune", ["--levels", "cheap"], "--levels: Input should be 'off', 'light', 'balanced' or 'strong'"),
        ("finetune", ["--batch-size", "0"], "--batch-size: Input should be greater than or equal to 1"),
        ("route", ["--pictures", "0"], "--pictures: Input should be greater than or equal to"),
        ("route", ["--seed", "1764300000000000000"], "--seed: Input should be less than 4294967296"),
        ("finetune", ["--seed", "-99999999999999999999999"], "--seed: Input should be greater than -4294967296"),
        ("prune", ["--seed", "99999999999999999999999"], "seed: Input should be less than 4294967296"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(dense: Path, tmp_path: Path, command: str, given: list[str], message: str) -> None:
    with errors.capture() as shown:
        result = CliRunner().invoke(app, [command, str(dense), "--out", str(tmp_path / "out"), *given])
    told = shown.get() + result.output
    assert result.exit_code == 1 and f"error: {message}" in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["calibrate", "embedded"], ["eval", "embedded", "--cards"]])
def test_shipped_checkpoints_are_not_written_to(command: list[str]) -> None:
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "embedded ships with Espalier and stays as it is" in result.output


@pytest.mark.parametrize("command", [["calibrate"], *([name, "--out", "out"] for name in ("prune", "quantize", "route"))])
def test_other_checkpoints_are_told_to_bring_their_data(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "other"))
    write_manifest(directory, Manifest())
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [command[0], str(directory), *command[1:]])
    assert result.exit_code == 1
    assert "needs --data FILE" in result.output and "Traceback" not in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


def test_a_checkpoint_that_is_not_pruned_has_nothing_to_draw(dense: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(dense), "--picture", str(tmp_path / "picture.png")])
    assert result.exit_code == 1
    assert "is not pruned: there is nothing to draw" in result.output


@pytest.mark.parametrize(
    ("command", "model"), [("prune", Recipe), ("finetune", FinetuneConfig), ("route", TrainingConfig), ("serve", Settings)]
)
def test_every_setting_is_an_option_with_its_default(command: str, model: type[BaseModel]) -> None:
    shown = " ".join(CliRunner().invoke(app, [command, "--help"]).output.split())
    for name, field in model.model_fields.items():
        if name == "checkpoint":  # an argument
            continue
        default = ", ".join(field.default) if isinstance(field.default, tuple) else str(field.default)
        said = re.escape(f"[default: ({default})]") if default else ""
        assert re.search(rf"--{name.replace('_', '-')} ((?! --).)*{said}", shown), name


def test_the_version_is_told() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"espalier {metadata.version('espalier')}\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--port", "99999"], "port: Input should be less than or equal to 65535"),
        (["--max-batch", "0", "--max-queue", "-1"], "max_batch: Input should be greater than or equal to 1; max_queue: "),
    ],
)
def test_bad_settings_are_refused_before_torch_comes(given: list[str], message: str) -> None:
    code = "import sys; from typer.testing import CliRunner; from espalier import app\n"
    code += f"print(CliRunner().invoke(app, ['serve', *{given}]).output, bool({{'torch', 'PIL'}} & sys.modules.keys()))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert f"error: {message}" in shown and shown.endswith("False\n") and shown.count("\n") == 2


def test_errors_are_no_markup() -> None:
    for place in ("/a/[red]/b", "/[/x]", "espalier[plot]"):
        with errors.capture() as shown, pytest.raises(Exit), _plain_errors():
            raise ValueError(place)
        assert shown.get() == f"error: {place}\n"


def test_a_device_that_is_not_here_is_one_line(dense: Path) -> None:
    for device in ("cuda:99", "gpu"):
        for command in ("inspect", "serve"):
            result = CliRunner().invoke(app, [command, str(dense), "--device", device])
            assert result.exit_code == 1 and f"error: device '{device}' is not" in result.output
            assert "Traceback" not in result.output


def test_help_opens_without_torch() -> None:
    check = "import sys, espalier; sys.exit(bool({'torch', 'transformers', 'PIL', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_ctrl_c_leaves_what_is_finished_and_no_checkpoint(dense: Path, tmp_path: Path) -> None:
    asked = ["--allocation", "search", "--no-projector", "--samples", "16"]
    state = tmp_path / "out.work" / "search.json"
    with subprocess.Popen(
        [*COMMAND, str(dense), "--out", "out", *asked], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a parent in the background has it ignored
    ) as running:  # fmt: skip
        try:
            while not state.exists():
                assert running.poll() is None, running.stderr.read() if running.stderr else ""
                time.sleep(0.05)
            running.send_signal(signal.SIGINT)
            _, errors = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 130
    assert "Traceback" not in errors
    assert {path.name for path in tmp_path.iterdir()} == {"out.work"}
    assert json.loads(state.read_text())["state"]["generation"] >= 1


def test_ctrl_c_stays_what_it_is_when_a_library_hides_it() -> None:
    def as_torch_does() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), _plain_errors():
            as_torch_does()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
