"""llm, the command: a picture attached, and an answer that fits a schema."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.ask import ANSWER, MODEL, PICTURE, QUESTION, Star

pytest.importorskip("llm")


def test_the_command_asks(base_url: str, tmp_path: Path) -> None:
    about = f"- model_id: it\n  model_name: {MODEL}\n  api_base: {base_url}\n  vision: true\n  supports_schema: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(about)
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}

    def llm(*more: str) -> str:
        command = [sys.executable, "-m", "llm", "-m", "it", "-a", str(PICTURE), QUESTION, *more]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout.strip()

    assert llm() == llm("--no-stream") == ANSWER
    assert Star.model_validate_json(llm("--schema", json.dumps(Star.model_json_schema())))
