"""OpenAI's client and Vercel's AI SDK, under Node.js. What they find wrong is an exception with its place."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.ask import ANSWER, MODEL, QUESTION, URL

JS = Path(__file__).parent / "js"
SCRIPTS = sorted(JS.glob("*.mjs"))

pytestmark = pytest.mark.skipif(not (JS / "node_modules").exists(), reason="needs Node.js and its packages: make clients")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_script_runs(base_url: str, script: Path) -> None:
    node = shutil.which("node")
    assert node, "Node.js is not on the path"
    about = {"baseURL": base_url, "model": MODEL, "url": URL, "question": QUESTION, "answer": ANSWER}
    run = subprocess.run([node, script, json.dumps(about)], cwd=script.parent, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
