"""Stored results: what was cut short is left out, and what follows begins a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.runs import rewrite, store, stored


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_was_cut_short_is_left_out_and_replaced(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "runs/some.jsonl"
    store(path, [{"n": 1}, {"n": "öäü"}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = [{"n": 1}, {"n": "öäü"}][: 2 if cut == 1 else 1]  # without its line end a line is whole
    assert stored(path) == kept
    assert path.read_bytes() == whole[:-cut], "to read changes nothing"
    store(path, [{"n": 3}])
    assert stored(path) == [*kept, {"n": 3}]


def test_nothing_is_stored_where_there_is_no_file(tmp_path: Path) -> None:
    assert stored(tmp_path / "none.jsonl") == []
    store(tmp_path / "none.jsonl", [])
    assert stored(tmp_path / "none.jsonl") == []


def test_a_line_in_the_middle_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    rewrite(path, [{"n": 1}])
    path.write_text(path.read_text() + '{"n": \n{"n": 3}\n')
    with pytest.raises(ValueError, match=r"some.jsonl, line 2: not JSON .*; delete it"):
        stored(path)
