"""litellm's proxy between OpenAI's client and the server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.clients.ask import ANSWER, MESSAGES, MODEL, Star

pytest.importorskip("litellm.proxy.proxy_cli")
KEY = "sk-a-key-for-this-test-alone"
CONFIG = """
model_list:
  - model_name: vision
    litellm_params: {model: openai/MODEL, api_base: URL, api_key: none}
"""


@pytest.fixture
def proxy(base_url: str, tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "config.yaml").write_text(CONFIG.replace("MODEL", MODEL).replace("URL", base_url))
    program = str(Path(sys.executable).with_name("litellm"))
    command = [program, "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": KEY}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **quiet) as process:
        try:
            for _ in range(1200):
                assert process.poll() is None, "the proxy ended"
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health/liveliness").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def test_it_passes_everything_on(proxy: str) -> None:
    with openai.OpenAI(base_url=proxy, api_key=KEY) as client:
        assert client.chat.completions.create(model="vision", messages=MESSAGES).choices[0].message.content == ANSWER
        pieces = client.chat.completions.create(model="vision", messages=MESSAGES, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == ANSWER
        reply = client.chat.completions.parse(model="vision", messages=MESSAGES, response_format=Star)
        assert isinstance(reply.choices[0].message.parsed, Star)
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            client.chat.completions.create(model="vision", messages=[{"role": "user", "content": "word " * 5000}])
        assert client.responses.create(model="vision", input="What is red?").output
