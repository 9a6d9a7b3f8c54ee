"""The benchmarks run end to end on a tiny geometry and on a stand-in server. What is fast is never asserted."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from threading import Thread
from typing import Any

import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import engine, http, memory, roofline
from benchmarks.runners import answer, draw_questions, generate, prune, share_weights, transformers_only_bytes
from models import kernels
from models.flops import prefill_flops
from models.forward import forward, prefill_input
from models.random_llava import geometry_config, random_model, tiny_config
from models.route import Route
from models.weight_format import is_2_4

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- the engine, by itself


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "geometry_config", lambda name: tiny_config())
    monkeypatch.setattr(roofline, "STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "PRODUCTS", {"cpu": (64, 64, 64), "cuda": (64, 64, 64)})


@pytest.mark.parametrize(("device", "batch"), [("cpu", 1), ("cpu", 3), pytest.param("cuda", 3, marks=pytest.mark.gpu)])
def test_engine_benchmark_end_to_end(tiny, capsys, device, batch):
    document = engine.run("tiny", ["16x3", "4x2"], batch, 4, 2, device, "float32", quiet=False)
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == document
    assert "ceiling of 16x3" in printed.err
    assert printed.err.index("GB/s") < printed.err.index("ceiling") < printed.err.index("transformers")
    assert {"geometry": "tiny", "dtype": "float32", "batch": batch, "prompt_tokens": 16 + 40, "new_tokens": 4,
            "repeats": 2}.items() <= document.items()  # fmt: skip
    assert list(document["routes"]) == list(document["ceiling"]["routes"]) == ["16x3", "4x2"]
    for name, route in document["routes"].items():
        assert set(route) == {
            "ttft_s", "tpot_s", "tokens_per_s", "requests_per_s", "ttft_speedup", "tpot_speedup", "requests_speedup",
            "ttft_over_ceiling", "tpot_over_ceiling", "encode_s", "route_s", "prefill_s", "kv_bytes", "flops_ratio",
            "router_flops_ratio", "prefill_over_flops",
        }  # fmt: skip
        assert all(value > 0 for key, value in route.items() if key != "router_flops_ratio"), name
        assert route["ttft_s"] >= max(route[part] for part in ("encode_s", "route_s", "prefill_s"))
        assert route["tokens_per_s"] == pytest.approx(batch / route["tpot_s"], rel=1e-2)
    assert set(document["transformers"]) == {"ttft_s", "tpot_s", "tokens_per_s", "requests_per_s"}
    assert document["peak_bytes"] > document["weight_bytes"] > document["transformers_only_bytes"] > 0
    assert document["peak_over_weights"] == pytest.approx(document["peak_bytes"] / document["weight_bytes"], rel=1e-2)


def test_a_router_of_real_size_chooses_the_tokens_and_is_counted(tiny, capsys):
    routes = engine.run("tiny", ["16x3", "4x2"], 2, 3, 1, "cpu", "float32", quiet=False, routed=True)["routes"]
    assert routes["16x3"]["router_flops_ratio"] == 0 < routes["4x2"]["router_flops_ratio"]
    assert routes["4x2"]["route_s"] > routes["16x3"]["route_s"]
    rows = {name: 40 + int(name.split("x")[0]) + 2 for name in routes}
    assert routes["4x2"]["kv_bytes"] / routes["16x3"]["kv_bytes"] == rows["4x2"] * 2 / (rows["16x3"] * 3)
    assert "router" in capsys.readouterr().err


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.7, "unstructured"), (0.5, "2:4")])
def test_pruned_weights_run_beside_dense_ones(tiny, capsys, sparsity, pattern):
    document = engine.run("tiny", ["4x3"], 2, 3, 2, "cpu", "bfloat16", quiet=False, sparsity=sparsity, pattern=pattern)
    assert "of the dense bytes" in capsys.readouterr().err
    assert list(document["routes"]) == list(document["ceiling"]["routes"]) == ["4x3", "4x3 sparse"]
    sparse = document["sparse"]
    assert (sparse["sparsity"], sparse["pattern"], list(sparse["over_dense"])) == (sparsity, pattern, ["4x3"])
    assert sparse["zeros"] == pytest.approx(sparsity, abs=0.02)
    assert all(value > 0 for value in sparse["over_dense"]["4x3"].values())
    if kernels.library():
        assert sparse["weight_bytes"]["packed"] > 0
        assert sparse["matrix_bytes_ratio"] < 0.85  # rows this short carry much beside their weights


def test_random_pruning_repeats_and_leaves_the_dense_model_alone():
    model = share_weights(random_model(tiny_config(), dtype=torch.float32))
    before = model.decoder_layers[0].qkv.weight.clone()
    one, two = prune(model, 0.5, "2:4"), prune(model, 0.5, "2:4")
    assert torch.equal(one.decoder_layers[2].down.weight, two.decoder_layers[2].down.weight)
    assert all(is_2_4(matrix.weight) and matrix.nonzeros == matrix.size // 2 for matrix in one.decoder_layers[1].linears().values())
    assert torch.equal(model.decoder_layers[0].qkv.weight, before)
    assert one.head is model.head


def test_quiet_prints_the_document_alone(tiny, capsys):
    engine.run("tiny", ["4x3"], 1, 2, 1, "cpu", "float32", quiet=True)
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    assert not printed.err


@pytest.mark.parametrize("name", ["0x22", "600x22", "128x0", "128x99", "abc", "128", "-1x22", "128x22x1", ""])
def test_a_bad_route_says_what_is_allowed(name):
    with pytest.raises(ValueError, match="such as 576x22: 1 to 576 tokens and 1 to 22 layers"):
        engine.parse_route(name, geometry_config("tinyllava-1.1b"))


def test_routes():
    config = geometry_config("tinyllava-1.1b")
    assert engine.default_routes(config) == ["576x22", "128x22"]
    assert engine.parse_route("576x22", config) == Route.full(576, 22)
    route = engine.parse_route("128x20", config)
    assert [layer for layer, runs in enumerate(route.layers) if not runs] == [19, 20]
    assert (len(route.kept_tokens), route.kept_tokens[:3]) == (128, (0, 4, 9))


@pytest.mark.parametrize(
    ("option", "message"),
    [({"geometry": "llava-70b"}, "not one of"), ({"device": "tpu"}, "cpu, cuda"), ({"device": "meta"}, "cpu, cuda"),
     ({"device": "cuda:99"}, "not there"), ({"dtype": "auto"}, "one of float32"), ({"routes": ["9x9x9"]}, "such as"),
     ({"sparsity": 1.0}, r"not in \[0, 1\)"), ({"sparsity": -0.1}, r"not in \[0, 1\)"), ({"sparsity": float("nan")}, "not in"),
     ({"sparsity": 0.5, "pattern": "4:8"}, "unstructured or 2:4"), ({"sparsity": 0.6, "pattern": "2:4"}, "0.5, not 0.6"),
     ({"pattern": "2:4"}, "0.5, not None")],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_before_anything_is_made(option, message, monkeypatch):
    monkeypatch.setattr(engine, "random_model", pytest.fail)
    monkeypatch.setattr(roofline, "measure", pytest.fail)
    options = {"geometry": "tinyllava-1.1b", "routes": None, "device": "cpu", "dtype": "bfloat16"} | option
    with pytest.raises(ValueError, match=message):
        engine.run(**options, batch=1, new_tokens=2, repeats=1, quiet=True)


# ---- both sides on one copy of the weights


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("llama", {"bias": True}), ("qwen2", {})])
def test_both_sides_agree_on_shared_weights(kind, options):
    config = tiny_config(kind, **options)
    untouched, reference = random_model(config, seed=1), random_model(config, seed=1)
    model = share_weights(reference)
    questions = draw_questions(model, 2)
    ids, route = questions.ids[0], Route.full(16, 3)
    cache = model.new_cache(route.rows(len(ids)))
    ours = forward(model, [prefill_input(model, ids, model.vision(questions.pixels).tokens[0], route, cache)])[0]
    with torch.no_grad():
        expected, theirs = (
            side(input_ids=ids[None], pixel_values=questions.pixels[:1]).logits[0, -1]
            for side in (untouched, reference)
        )
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert answer(model, questions, route, 8).tokens[0] == generate(reference, questions.first(), 8).tokens[0]


def test_shared_weights_are_held_once():
    reference = random_model(tiny_config(bias=True), seed=1)
    before = sum(parameter.nbytes for parameter in reference.parameters())
    model = share_weights(reference)
    assert sum(parameter.nbytes for parameter in reference.parameters()) == before
    fused = {matrix.weight.untyped_storage().data_ptr() for matrix in model.linears().values()}
    unused = reference.model.vision_tower.encoder.layers[len(model.vision.tower.layers) :]
    own = {id(parameter) for parameter in unused.parameters()}
    matrices = [module.weight for module in reference.modules() if isinstance(module, torch.nn.Linear)]
    assert all(weight.untyped_storage().data_ptr() in fused for weight in matrices if id(weight) not in own)
    assert len(unused) == 1
    assert transformers_only_bytes(reference, model) == sum(parameter.nbytes for parameter in unused.parameters())


def test_neither_side_stops_early_and_an_image_token_is_a_token():
    reference = random_model(tiny_config(), seed=1)
    model = share_weights(reference)
    questions = draw_questions(model, 1)
    second = generate(reference, questions, 2).tokens[0][1]
    reference.generation_config.eos_token_id = second
    with torch.no_grad():
        model.head.weight[127] = 3 * model.head.weight[second]
    ours, theirs = answer(model, questions, Route.full(16, 3), 6), generate(reference, questions, 6)
    assert ours.tokens == theirs.tokens
    assert len(ours.tokens[0]) == 6
    assert 127 in ours.tokens[0]


# ---- the ceiling


def test_a_ceiling_is_the_slower_of_arithmetic_and_memory():
    machine = roofline.Ceiling(bytes_per_s=10.0, flops_per_s=100.0)
    assert machine.seconds(200, 10) == 2
    assert machine.seconds(200, 50) == 5


def test_ceilings_follow_the_route():
    config = tiny_config()
    model = share_weights(random_model(config))
    full, few = Route.full(16, 3), Route(16, (1, 2), (True, False, True))
    block = sum(matrix.bytes for matrix in model.decoder_layers[0].linears().values())
    assert roofline.decode_bytes(model, full) - roofline.decode_bytes(model, few) == block
    arithmetic = roofline.Ceiling(bytes_per_s=float("inf"), flops_per_s=1.0)
    difference = arithmetic.ttft(model, full, 56, 2) - arithmetic.ttft(model, few, 56, 2)
    assert difference == 2 * (prefill_flops(config, full, 56) - prefill_flops(config, few, 56))
    assert arithmetic.tpot(model, full, 3) == 3 * 2 * roofline.decode_bytes(model, full) / 4


def test_vision_flops_are_those_of_torch():
    config = tiny_config()
    config.vision_config.image_size = 160  # so many rows that the tower's few spare ones do not count
    model = share_weights(random_model(config))
    with FlopCounterMode(display=False) as counter:
        model.vision(torch.zeros(1, 3, 160, 160))
    assert roofline.vision_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_peak_of_a_later_phase_is_its_own():
    def hold(count: int) -> None:
        torch.ones(count, dtype=torch.uint8)

    large, small = memory.peak_bytes(lambda: hold(1 << 28), CPU), memory.peak_bytes(lambda: hold(1 << 20), CPU)
    assert large >= 1 << 28
    assert small <= large  # equal where the kernel does not reset the mark


# ---- a running server


class Stub:
    """Answers like a server: the first request is refused, `broken` is no level, `lost` ends before its answer does."""

    def __init__(self) -> None:
        self.levels: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.chat)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": []}

    async def chat(self, request: Request) -> Response:
        level = request.headers["x-pruning-level"]
        self.levels.append(level)
        self.asked.append(await request.json())
        if len(self.levels) == 1:
            return JSONResponse({"error": {}}, 429, {"Retry-After": "0"})
        if level == "broken":
            return JSONResponse({"error": {}}, 400)
        return StreamingResponse(self.stream(level), media_type="text/event-stream")

    async def stream(self, level: str) -> Any:
        for delta in ({"role": "assistant", "content": ""}, {"content": "a red"}, {"content": " star"}):
            yield self.event({"choices": [{"index": 0, "delta": delta}], "usage": None})
        yield ": still here\n\n"
        if level == "failed":
            yield self.event({"error": {"message": "no"}})
        elif level != "lost":
            yield self.event({"choices": [], "usage": {"completion_tokens": 3}})
            yield "data: [DONE]\n\n"

    def event(self, data: dict[str, Any]) -> str:
        return f"data: {json.dumps(data)}\n\n"


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="off"))
        thread = Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def test_http_benchmark_end_to_end(capsys):
    stub = Stub()
    with serving(stub.app) as url:
        document = http.run(url, 3, 12, "off=1, strong=2,broken", 7, quiet=False)
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == document
    assert "1 × 429" in printed.err
    assert document["answered"] == 9
    assert document["errors"] == {"400": 3, "429": 1}
    assert {name: level["answered"] for name, level in document["levels"].items()} == {"off": 3, "strong": 6}
    for part in (document, *document["levels"].values()):
        assert part["requests_per_s"] > 0
        assert part["tokens_per_s"] == pytest.approx(3 * part["requests_per_s"], rel=1e-2)
    for level in document["levels"].values():
        total = level["total_s"]
        assert 0 < level["ttft_s"]["p50"] <= total["p50"] <= total["p95"] <= total["p99"]
    assert sorted(stub.levels[1:]) == sorted(3 * ["off"] + 6 * ["strong"] + 3 * ["broken"])
    bodies = [json.dumps(body) for body in stub.asked]
    assert len(set(bodies)) == 12  # each picture and question is another, and the refused one came back
    image, text = stub.asked[0]["messages"][0]["content"]
    picture = Image.open(BytesIO(base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))))
    assert picture.size == (96, 96)
    assert text["text"]
    assert (stub.asked[0]["max_tokens"], stub.asked[0]["stream"]) == (7, True)


def test_answers_that_break_off_are_errors(capsys):
    stub = Stub()
    with serving(stub.app) as url:
        document = http.run(url, 1, 5, "lost=2,failed=2,off=1", 7, quiet=True)
    assert document["errors"] == {"429": 1, "cut short": 2, "error in stream": 2}
    assert list(document["levels"]) == ["off"]
    assert not capsys.readouterr().err


def test_a_server_that_always_refuses_is_given_up(monkeypatch, capsys):
    app = FastAPI()
    app.get("/v1/models")(lambda: {})
    app.post("/v1/chat/completions")(lambda: JSONResponse({}, 429, {"Retry-After": "0"}))
    monkeypatch.setattr(http, "TRIES", 3)
    with serving(app) as url:
        document = http.run(url, 2, 2, "off", 7, quiet=False)
    assert (document["answered"], document["errors"], document["levels"]) == (0, {"429": 6}, {})


def test_no_server_is_a_plain_error():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match="no server answers at http://127"):
        http.run(f"http://127.0.0.1:{port}", 1, 1, "off", 1, quiet=True)
    with pytest.raises(ConnectionError, match="no server answers"):
        http.run("localhost:8000", 1, 1, "off", 1, quiet=True)
    with pytest.raises(ValueError, match="Invalid port"):
        http.run("http://localhost:port", 1, 1, "off", 1, quiet=True)
    with serving(FastAPI()) as url, pytest.raises(ConnectionError, match="answers GET /v1/models with 404"):
        http.run(url, 1, 1, "off", 1, quiet=True)


def test_the_mix_of_levels():
    assert http.parse_mix("off=1, strong=30,auto") == {"off": 1, "strong": 30, "auto": 1}


@pytest.mark.parametrize("levels", ["", "off=", "off=0", "off=x", "=1", "off,,strong", "off=-1", "off=1.5", "a=1=1"])
def test_a_mix_that_makes_no_sense_is_refused(levels):
    with pytest.raises(ValueError, match="such as off=1,strong=3"):
        http.parse_mix(levels)


def test_percentiles_are_values_that_were_measured():
    assert http.percentiles([3.0, 1.0, 2.0, 4.0]) == {"p50": 2.0, "p95": 4.0, "p99": 4.0}
    assert http.percentiles([5.0]) == {"p50": 5.0, "p95": 5.0, "p99": 5.0}
