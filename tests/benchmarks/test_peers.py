"""The comparison with other systems, on tiny weights with what is installed here."""

from __future__ import annotations

import json
import time

import pytest

from benchmarks import peers
from benchmarks.peer_worker import SYSTEMS

OURS = [name for name in SYSTEMS if name.startswith("espalier")]


@pytest.mark.slow  # five processes that import torch
def test_peers_answer_in_turn_and_what_is_missing_is_named(capsys, tmp_path):
    document = peers.run("tiny", 3, 2, True, {"vllm": None, "openvino": str(tmp_path / "python")}, quiet=False)
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == document
    assert list(document["systems"]) == [*OURS, "transformers"]
    for row in document["systems"].values():
        measured = [row[what] for what in ("short_s", "answer_s", "batch_s")]
        assert all(0 < times["least"] <= times["median"] <= times["most"] for times in measured)
        assert row["ttft_s"] + row["tpot_s"] == pytest.approx(row["short_s"]["median"], rel=0.01)
    assert document["skipped"]["vllm"] == "no interpreter was given"
    assert "No such file" in document["skipped"]["openvino"]
    assert "vllm was left out" in printed.err


def test_a_worker_that_fails_says_why(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho a line of its own; echo no config.json >&2")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"vllm ended: no config\.json"):
        peers.Peer("vllm", str(python), tmp_path)


def test_what_a_worker_has_started_ends_with_it(tmp_path):
    """vLLM's engine is such a process, and holds the weights."""
    python, alive = tmp_path / "python", tmp_path / "alive"
    begun = f"while [ ! -e {alive} ]; do sleep 0.01; done"
    python.write_text(f"#!/bin/sh\n(while sleep 0.05; do date > {alive}; done) & {begun}; echo ready; wait")
    python.chmod(0o755)
    peers.Peer("vllm", str(python), tmp_path).close()
    alive.unlink()
    time.sleep(0.3)
    assert not alive.exists()
