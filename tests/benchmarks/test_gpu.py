"""`make gpu` tried without a card: a part that fails or hangs does not stop the others, and a report is there at any time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import Part

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = {"geometry": "tiny", "card": "none"}


def python(name: str, code: str, limit_s: float = 60.0) -> Part:
    return Part(name, [sys.executable, "-c", code], limit_s)


def test_what_fails_or_hangs_is_reported_and_the_rest_runs_on(tmp_path: Path) -> None:
    mark = tmp_path / "late"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    hangs = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    parts = [
        python("fails", "import json, sys; print(json.dumps({'batch': 1})); sys.exit('no memory')"),
        python("hangs", hangs, limit_s=2.5),
        python("ends", "import json; print('words'); print(json.dumps({'difference': 0.5}))"),
    ]
    started = time.monotonic()
    document = gpu.run(parts, dict(DOCUMENT), tmp_path / "new" / "gpu.json", 60)
    assert time.monotonic() - started < 30
    found = document["parts"]
    assert {name: entry["status"] for name, entry in found.items()} == {"fails": "failed", "hangs": "timed out", "ends": "ok"}
    assert (found["fails"]["error"], found["fails"]["results"]) == ("no memory", [{"batch": 1}])
    assert "in <module>" in found["hangs"]["error"], "where it hung"
    assert found["ends"]["results"] == [{"difference": 0.5}]
    assert json.loads((tmp_path / "new" / "gpu.json").read_text()) == document
    report = (tmp_path / "new" / "gpu.md").read_text()
    assert "| hangs | timed out |" in report and "    no memory" in report and 'ends: {"difference": 0.5}' in report
    time.sleep(max(0.0, started + 8 - time.monotonic()))
    assert not mark.exists(), "what a part has started ends with it"


def test_after_the_deadline_parts_are_skipped(tmp_path: Path) -> None:
    parts = [python("first", "import time; time.sleep(60)"), python("second", "print(1)")]
    found = gpu.run(parts, dict(DOCUMENT), tmp_path / "gpu.json", deadline_s=0.5)["parts"]
    assert [entry["status"] for entry in found.values()] == ["timed out", "skipped"]


def test_the_parts_in_order_of_worth() -> None:
    parts = gpu.parts("llava-1.5-7b", "tinyllava-1.1b", "cuda", "bfloat16")
    assert [part.name for part in parts] == ["gpu tests", "parity at off", "dense", "served", "nf4", "2:4", "50 %"]
    timed = [part for part in parts if part.name in ("dense", "nf4", "2:4", "50 %")]
    assert all("'batches': (1, 8, 32)" in part.command[-1] for part in timed)
    assert all("'llava-1.5-7b'" in part.command[-1] for part in [parts[1], *timed])
    for file in ("test_forward.py", "test_attention_triton.py", "test_decode_graph.py"):
        assert any(file in word for word in parts[0].command)


def test_packages_are_the_projects_own_but_never_torch() -> None:
    found = gpu.packages()
    assert {"transformers", "pydantic-settings", "fastapi", "pytest", "bitsandbytes"} <= set(found) and "torch" not in found


def test_a_python_without_a_card_says_so() -> None:
    with pytest.raises(SystemExit, match="sees no CUDA card"):
        gpu.find_card("cuda:99")


def test_the_model_and_its_benchmark_need_no_server_packages() -> None:
    """A machine with a card may have torch and transformers and no way to install more."""
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('pydantic', 'pydantic_settings', 'fastapi', 'uvicorn', 'typer', 'prometheus_client'))\n"
        "import benchmarks.engine, benchmarks.parity"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_the_whole_command_runs_on_a_cpu(tmp_path: Path) -> None:
    options = ["--geometry", "tiny", "--served", "tiny", "--device", "cpu", "--dtype", "float32"]
    options += ["--out", str(tmp_path / "gpu.json")]
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", *options], cwd=ROOT, capture_output=True, text=True)
    document = json.loads(done.stdout.splitlines()[-1])
    statuses = {name: (entry["status"], entry.get("error")) for name, entry in document["parts"].items()}
    assert set(statuses.values()) == {("ok", None)}, statuses
    assert done.returncode == 0
    assert "| 64 | strong |" in done.stdout and "| nf4 | 32 | 4x3 nf4 |" in done.stdout
    assert "| dense | 8 | 16x3 |" in done.stdout and "| 2:4 | 1 | 4x3 sparse |" in done.stdout
    assert document["parts"]["parity at off"]["results"][0]["tiny"]["equal_tokens"] == 16
