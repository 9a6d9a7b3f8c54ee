"""`make gpu`: all that a CUDA card is to show, in nine minutes. A part that fails or takes too long is reported; the rest runs on.

Needs the checkout, Python and a torch that sees the card. Other packages that are missing are installed with pip, if that can be.
Imports the standard library alone: each part is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 520.0
"""For all parts: what is called within ten minutes ends by itself."""
PACKAGES = ("transformers", "safetensors", "numpy", "pillow", "rich", "pytest", "hypothesis")
PIP_LIMIT_S = 90.0
ERROR_LINES = 12


@dataclass(frozen=True)
class Part:
    """A command that ends with one JSON document on the last line of its stdout, or for pytest with its summary."""

    name: str
    command: Sequence[str]
    limit_s: float


def parts(geometry: str, device: str, dtype: str) -> list[Part]:
    """What matters most comes first: time may run out."""

    def call(function: str, **options: Any) -> list[str]:
        module, _, name = function.partition(":")
        return [sys.executable, "-c", f"from {module} import {name}; {name}(**{options!r})"]

    def bench(batch: int, **sparse: Any) -> list[str]:
        return call(
            "benchmarks.engine:run", geometry=geometry, routes=None, batch=batch, new_tokens=32, repeats=3, device=device,
            dtype=dtype, quiet=False, **sparse,
        )  # fmt: skip

    marked = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    # Warnings of versions other than ours are no failures here.
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", *marked]
    sparse: dict[str, dict[str, Any]] = {"2:4": {"sparsity": 0.5, "pattern": "2:4"}, "50 %": {"sparsity": 0.5}}
    return [
        Part("gpu tests", tests, 100),
        Part("parity at off", call("benchmarks.parity:run", geometry=geometry, device=device, dtype=dtype), 60),
        *(Part(f"dense, batch {batch}", bench(batch), 75) for batch in (1, 8)),
        *(Part(f"{name}, batch {batch}", bench(batch, **options), 90) for name, options in sparse.items() for batch in (1, 8)),
    ]


def run_part(part: Part, limit_s: float) -> dict[str, Any]:
    """Run it for at most `limit_s`. Returns its `status` (ok, failed, timed out or skipped), `seconds`, and `result` or `error`."""
    if limit_s <= 0:
        return {"status": "skipped", "seconds": 0.0, "error": "no time was left"}
    start, status = time.monotonic(), "ok"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            part.command, cwd=ROOT, stdout=out, stderr=errors, env=os.environ | {"PYTHONPATH": _path()}, start_new_session=True
        )
        try:
            if process.wait(limit_s):
                status = "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            _kill(process)
        out.seek(0)
        errors.seek(0)
        lines, said = out.read().strip().splitlines(), errors.read().strip().splitlines()
    entry: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    if status == "ok":
        return entry | {"result": _document(lines[-1] if lines else "")}
    return entry | {"error": "\n".join((said or lines)[-ERROR_LINES:]) or f"exit status {process.returncode}"}


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The part and whatever it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _document(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


def install_missing() -> dict[str, Any] | None:
    """Install what is missing at the versions in constraints.txt; None if nothing is. torch is never touched."""
    missing = [name for name in PACKAGES if _version(name) is None]
    if not missing:
        return None
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt", *missing]
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
    lines += ["", "| part | route | TTFT ms | × transformers | × roofline | TPOT ms | × transformers | × roofline | requests/s |"]
    lines += ["|---" * 9 + "|"]
    for name, entry in document["parts"].items():
        result = entry.get("result")
        for route, row in result["routes"].items() if isinstance(result, dict) and "routes" in result else ():
            cells = [f"{row[key]:.3g}" for key in ("ttft_speedup", "ttft_over_roofline")]
            cells += [f"{1e3 * row['tpot_s']:.3g}", *(f"{row[key]:.3g}" for key in ("tpot_speedup", "tpot_over_roofline"))]
            lines.append(f"| {name} | {route} | {1e3 * row['ttft_s']:.3g} | {' | '.join(cells)} | {row['requests_per_s']:.3g} |")
    for name, entry in document["parts"].items():
        if "error" in entry:
            lines += ["", f"## {name}: {entry['status']}", "", *(f"    {line}" for line in entry["error"].splitlines())]
        elif not (isinstance(entry["result"], dict) and "routes" in entry["result"]):
            lines += ["", f"{name}: {json.dumps(entry['result'])}"]
    return "\n".join(lines)


def run(wanted: Sequence[Part], document: dict[str, Any], out: Path, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
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
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the command itself")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu.json", help="the document; tables go beside it, in .md")
    asked = parser.parse_args()
    card = find_card(asked.device)
    pip = install_missing()
    document = {
        "geometry": asked.geometry, "device": asked.device, "dtype": asked.dtype, "card": card, "pip": pip,
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in ("torch", "triton", *PACKAGES)}},
    }  # fmt: skip
    run(parts(asked.geometry, asked.device, asked.dtype), document, asked.out)
    sys.stdout.write(tables(document) + "\n\n" + json.dumps(document) + "\n")
    sys.exit(any(entry["status"] != "ok" for entry in document["parts"].values()))


if __name__ == "__main__":
    main()
