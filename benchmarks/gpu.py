"""`make gpu`: all that a CUDA card is to show, in nine minutes. A part that fails or takes too long is reported; the rest runs on.

Needs the checkout, Python and a torch that sees the card. Other packages that are missing are installed with pip, if that can be.
Imports the standard library alone: each part is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 530.0
"""For all of it."""
BATCHES = (1, 8, 32)
PIP_LIMIT_S = 60.0
ERROR_LINES = 12


@dataclass(frozen=True)
class Part:
    """A command whose JSON documents, each on a line of stdout, are its result; without one, its last line is."""

    name: str
    command: Sequence[str]
    limit_s: float


def parts(geometry: str, served: str, device: str, dtype: str) -> list[Part]:
    """What matters most comes first: time may run out."""

    def call(function: str, **options: Any) -> list[str]:
        module, _, name = function.partition(":")
        return [sys.executable, "-c", f"from {module} import {name}; {name}(**{options!r})"]

    def bench(**sparse: Any) -> list[str]:
        return call(
            "benchmarks.engine:run", geometry=geometry, routes=None, batches=BATCHES, new_tokens=32, repeats=3, device=device,
            dtype=dtype, quiet=False, **sparse,
        )  # fmt: skip

    marked = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    # Warnings of versions other than ours are no failures here.
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", *marked]
    return [
        Part("gpu tests", tests, 120),
        Part("parity at off", call("benchmarks.parity:run", geometry=geometry, device=device, dtype=dtype), 60),
        Part("dense", bench(), 130),
        Part("served", call("benchmarks.curve:run", geometry=served, device=device), 120),
        Part("nf4", bench(quantization="nf4"), 110),
        Part("2:4", bench(sparsity=0.5, pattern="2:4"), 150),
        Part("50 %", bench(sparsity=0.5), 240),  # its weights are compressed on the CPU
    ]


def run_part(part: Part, limit_s: float) -> dict[str, Any]:
    """Run it for at most `limit_s`. Returns `status` (ok, failed, timed out or skipped), `seconds`, the `results` that it had until
    then and, unless it is ok, the last lines of its stderr as `error`."""
    if limit_s <= 0:
        return {"status": "skipped", "seconds": 0.0, "results": [], "error": "no time was left"}
    start, status = time.monotonic(), "ok"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            part.command, cwd=ROOT, stdout=out, stderr=errors, env=os.environ | {"PYTHONPATH": _path(), "PYTHONFAULTHANDLER": "1"},
            start_new_session=True,
        )  # fmt: skip
        try:
            if process.wait(limit_s):
                status = "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
            process.send_signal(signal.SIGABRT)  # at which Python says where it is
            time.sleep(1)
        finally:
            _kill(process)
        out.seek(0)
        errors.seek(0)
        lines, said = out.read().strip().splitlines(), errors.read().strip().splitlines()
    documents = [document for line in lines if (document := _document(line)) is not None]
    entry = {"status": status, "seconds": round(time.monotonic() - start, 1), "results": documents or lines[-1:]}
    if status == "ok":
        return entry
    return entry | {"error": "\n".join(said[-ERROR_LINES:]) or f"nothing on stderr; exit status {process.returncode}"}


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The part and whatever it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _document(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def packages() -> list[str]:
    """What the parts need beside torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    names = [re.split("[^a-z0-9-]", wanted)[0] for wanted in project["dependencies"]]
    return [*(name for name in names if name != "torch"), "pytest", "hypothesis", "httpx", "bitsandbytes"]


def install_missing() -> dict[str, Any] | None:
    """Install what is missing at the versions in constraints.txt; None if nothing is. torch is never touched."""
    missing = [name for name in packages() if _version(name) is None]
    if not missing:
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as others:  # bitsandbytes would bring the torch that is pinned
        pinned = (ROOT / "constraints.txt").read_text("utf-8").splitlines(keepends=True)
        others.writelines(line for line in pinned if not line.startswith("torch="))
        others.flush()
        quick = ["--quiet", "--disable-pip-version-check", "--retries", "0"]
        command = [sys.executable, "-m", "pip", "install", *quick, "-c", others.name, *missing]
        return run_part(Part("pip", command, PIP_LIMIT_S), PIP_LIMIT_S) | {"packages": missing}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def tables(document: dict[str, Any]) -> str:
    """The document for people, in Markdown."""
    lines = [f"# {document['geometry']} on {document['card']}", "", "| part | status | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {entry['status']} | {entry['seconds']:g} |" for name, entry in document["parts"].items()]
    lines += ["", f"| part | batch | route |{' {} ms | × transformers | × roofline |' * 2} requests/s |".format("TTFT", "TPOT")]
    lines += ["|---" * 10 + "|"]
    curve = ["", "| at once | level | requests/s | tokens/s | TTFT s, p50 and p95 | end to end s, p50 and p95 |", "|---" * 6 + "|"]
    others = []
    for name, entry in document["parts"].items():
        for result in entry["results"]:
            if "concurrency" in result:
                curve += [_curve_line(result["concurrency"], *row) for row in result["levels"].items()]
                continue
            if "routes" not in result:
                others += ["", f"{name}: {result if isinstance(result, str) else json.dumps(result)}"]
                continue
            for route, row in result["routes"].items():
                times = [f"{1e3 * row[f'{key}_s']:.3g} | {row[f'{key}_speedup']:.3g} | {row[f'{key}_over_roofline']:.3g}"
                         for key in ("ttft", "tpot")]  # fmt: skip
                lines.append(f"| {name} | {result['batch']} | {route} | {' | '.join(times)} | {row['requests_per_s']:.3g} |")
        if "error" in entry:
            others += ["", f"## {name}: {entry['status']}", "", *(f"    {line}" for line in entry["error"].splitlines())]
    return "\n".join(lines + curve + others)


def _curve_line(concurrency: int, level: str, row: dict[str, Any]) -> str:
    times = [f"{row[key]['p50']:.3g}, {row[key]['p95']:.3g}" for key in ("ttft_s", "e2e_s")]
    return f"| {concurrency} | {level} | {row['requests_per_s']:.3g} | {row['tokens_per_s']:.4g} | {' | '.join(times)} |"


def run(wanted: Sequence[Part], document: dict[str, Any], out: Path, deadline_s: float) -> dict[str, Any]:
    """Run the parts, each for at most its limit and all for at most `deadline_s`. `out` holds what is finished at any time, and its
    tables beside it in a file that ends in .md."""
    start = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    document["parts"] = {}
    for number, part in enumerate(wanted, 1):
        limit_s = min(part.limit_s, deadline_s - (time.monotonic() - start))
        _say(f"{number}/{len(wanted)} {part.name}, at most {max(limit_s, 0):.0f} s ...")
        entry = run_part(part, limit_s)
        _say(f"    {entry['status']} after {entry['seconds']:g} s")
        document["parts"][part.name] = entry
        document["seconds"] = round(time.monotonic() - start, 1)
        out.write_text(json.dumps(document, indent=1) + "\n")
        out.with_suffix(".md").write_text(tables(document) + "\n")
    return document


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def find_card(device: str) -> str:
    """The card's name. Ends the program with one line where torch sees none."""
    try:
        import torch
    except ImportError:
        sys.exit(f"{sys.executable} has no torch; say make gpu PYTHON=/path/to/python for one that has, built for CUDA")
    if device == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} of {sys.executable} sees no CUDA card")
    return torch.cuda.get_device_name(torch.device(device))


def main() -> None:
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--geometry", default="llava-1.5-7b", help="of `espalier bench engine`")
    parser.add_argument("--served", default="tinyllava-1.1b", help="geometry of the served curve; the other's loads too long")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the command itself")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu.json", help="the document; tables go beside it, in .md")
    asked, start = parser.parse_args(), time.monotonic()
    card = find_card(asked.device)
    pip = install_missing()
    document = {
        "geometry": asked.geometry, "device": asked.device, "dtype": asked.dtype, "card": card, "pip": pip,
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in ("torch", "triton", *packages())}},
    }  # fmt: skip
    wanted = parts(asked.geometry, asked.served, asked.device, asked.dtype)
    run(wanted, document, asked.out, DEADLINE_S - (time.monotonic() - start))
    sys.stdout.write(tables(document) + "\n\n" + json.dumps(document) + "\n")
    sys.exit(any(entry["status"] != "ok" for entry in document["parts"].values()))


if __name__ == "__main__":
    main()
