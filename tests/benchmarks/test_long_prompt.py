"""The long-prompt benchmark on a stand-in server that stops answering while it reads a prompt."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from benchmarks import long_prompt
from tests.benchmarks.test_http import serving

app = FastAPI()
reading = asyncio.Lock()


@app.get("/v1/models")
async def models() -> dict[str, Any]:
    return {"data": []}


@app.post("/v1/chat/completions")
async def chat(request: Request) -> Any:
    asked = await request.json()
    if asked.get("stream"):
        return StreamingResponse(tokens(), media_type="text/event-stream")
    async with reading:
        await asyncio.sleep(0.3)
    return Response(json.dumps({"usage": {"prompt_tokens": len(asked["messages"][0]["content"].split())}}))


async def tokens() -> Any:
    while True:
        async with reading:
            await asyncio.sleep(0.005)
        yield 'data: {"choices": [{"index": 0, "delta": {"content": "word"}}]}\n\n'


def test_a_prompt_that_holds_answers_up_is_seen(capsys: Any) -> None:
    with serving(app) as url:
        document = long_prompt.run(url, 2, 50, 1, "off", quiet=True)
    assert json.loads(capsys.readouterr().out) == document
    assert document["prompt_tokens"] == 51
    assert document["beside_s"]["p99"] > 0.25 > document["alone_s"]["p50"]
    assert document["p99_over_median"] > 3
