"""What a run needs is told before it begins: disk, memory and time; and a search keeps to three copies of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.checkpoint import weight_bytes
from pruning.static import held_out, pipeline, plan, search
from pruning.static.compressed import compress, compressed_bytes, decompress
from pruning.static.database import Database
from pruning.static.evolution import EvolutionConfig
from pruning.static.fitness import Divergence
from pruning.static.projector import TuningConfig
from pruning.static.recipe import read
from tests.pruning.kills import Killed, die_at
from tests.pruning.static.tiny_search import prepare
from tests.server.tiny import write

SEARCH = read(None, {"allocation": "search", "samples": 16})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_a_compressed_weight_comes_back_bit_for_bit(dtype: torch.dtype, density: float) -> None:
    random = torch.Generator().manual_seed(0)
    weight = (torch.randn(37, 53, generator=random) * (torch.rand(37, 53, generator=random) < density)).to(dtype)
    parts = compress(weight)
    assert torch.equal(decompress(**parts, shape=weight.shape), weight)
    share = int(weight.count_nonzero()) / weight.numel()
    assert sum(part.nbytes for part in parts.values()) == pytest.approx(compressed_bytes(37 * 53, share, dtype.itemsize), abs=1)


@pytest.mark.parametrize(
    ("weights", "checkpoint", "density", "wanted"),
    [
        (6_476_005_376, 14_127_000_000, 0.5, 1),  # LLaVA-1.5-7B
        (6_476_005_376, 14_127_000_000, 0.3, 2),
        (12_688_000_000, 26_700_000_000, 0.5, 1),  # 13B
        (106_168_320, 284_000_000, 0.5, 4),  # smol: all of them, for there is room
        (7_400_000, 17_000_000, 0.5, 4),  # embedded
    ],
)
def test_a_search_keeps_to_three_copies_of_a_large_model(weights: int, checkpoint: int, density: float, wanted: int) -> None:
    found = search.levels(weights, density, 2, checkpoint)
    assert found == wanted
    entry = compressed_bytes(weights, density, 2)
    size = plan.Disk(entry, (2 * found + 1) * entry, checkpoint)
    assert size.most <= max(3 * checkpoint, search.SMALL + checkpoint)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "EVOLUTION", EvolutionConfig(generations=2, offspring=2))
    monkeypatch.setattr(search, "TUNING", TuningConfig(steps=1))
    monkeypatch.setattr(held_out, "PICTURES", 1)


@pytest.mark.parametrize("small", [4e9, 0])
def test_the_disk_that_a_search_takes_is_foretold(tmp_path, monkeypatch, quick, small: float) -> None:
    monkeypatch.setattr(search, "SMALL", small)
    dense = write(tmp_path / "dense", layers=6)
    size = plan.disk(SEARCH, dense, "auto")
    with monkeypatch.context() as patch:
        die_at(patch, search, "compare", 1)
        with pytest.raises(Killed):
            pipeline.run(SEARCH, dense, tmp_path / "out", quiet=True)
    work = tmp_path / "out.work"
    assert used(work / "database") == pytest.approx(size.database, rel=0.2)
    assert used(work, "block-*") == pytest.approx(size.blocks, rel=0.2)
    pipeline.run(SEARCH, dense, tmp_path / "out", quiet=True)
    assert used(tmp_path / "out", "*.safetensors") == pytest.approx(size.result, rel=0.01)
    assert size.result == weight_bytes(dense)


def used(directory: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in directory.glob(pattern))


@pytest.mark.parametrize("closer", ["sequential", "database"])
def test_what_was_not_kept_goes_before_the_result_is_written(tmp_path, monkeypatch, quick, closer: str) -> None:
    """And a run that is killed while it writes goes on with what was."""
    other = {"sequential": "database", "database": "sequential"}[closer]
    dense, compare = write(tmp_path / "dense"), search.compare
    monkeypatch.setattr(search, "compare", lambda *given: compare(*given) | {closer: 0.0, other: 1.0})
    whole = pipeline.run(SEARCH, dense, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        die_at(patch, pipeline, "derive", 1)
        with pytest.raises(Killed):
            pipeline.run(SEARCH, dense, tmp_path / "out", quiet=True)
    names = {path.name.split("-")[0] for path in (tmp_path / "out.work").iterdir()}
    assert ("block" in names) == (closer == "sequential") and ("database" in names) == (closer == "database")
    with monkeypatch.context() as patch:
        patch.setattr(search, "search", None)
        assert pipeline.run(SEARCH, dense, tmp_path / "out", quiet=True).files == whole.files


def test_the_dense_answers_are_kept_as_hidden_states(tmp_path: Path) -> None:
    """At 7B 8 KB a token, where log-probabilities were 128 KB; and no less exact."""
    setting = prepare(tmp_path, 2)
    model, references = setting.divergence.model, setting.divergence.references
    for reference in references:
        assert reference.hidden.shape == (len(reference.sample.before_answers), model.config.text_config.hidden_size)
    again = Divergence.from_dense(model, [reference.sample for reference in references])
    assert again(range(2)).tolist() == [0, 0]


def test_a_plan_is_told_before_the_work(tmp_path, capsys, quick) -> None:
    dense = write(tmp_path / "dense")
    pipeline.run(read(None, {"samples": 4}), dense, tmp_path / "plain")
    plain = capsys.readouterr().err
    assert "plan: up to 0.0 GB of disk, 0." in plain and "GB of memory, about" in plain and "(blocks " in plain
    assert plain.index("plan:") < plain.index("blocks ━")
    pipeline.run(SEARCH, dense, tmp_path / "search")
    assert all(part in capsys.readouterr().err.replace("\n", " ") for part in ("plan:",))


def test_levels_share_what_a_policy_says(tmp_path: Path) -> None:
    """Dense weights come from the checkpoint: they are not stored again."""
    setting = prepare(tmp_path, 2)
    database: Database = setting.database
    linear = setting.divergence.model.model.language_model.layers[0].self_attn.q_proj
    setting.local([(1, -1, *[0] * (len(database.names) - 2))], [0])
    assert int(linear.weight.count_nonzero()) == database.nonzeros(database.names[0], 1)
    setting.local._loader.load(None)
    assert torch.equal(linear.weight, database.weight(database.names[0], None))
    assert int(linear.weight.count_nonzero()) > database.nonzeros(database.names[0], 1)
