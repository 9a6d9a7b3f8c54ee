"""The engine benchmark runs end to end on a tiny geometry. What is fast is never asserted."""

from __future__ import annotations

import json

import pytest

from benchmarks import engine, roofline
from models import kernels
from models.random_llava import geometry_config
from models.route import Route


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "PRODUCTS", {"cpu": (64, 64, 64), "cuda": (64, 64, 64)})


@pytest.mark.parametrize(("device", "batch"), [("cpu", 1), ("cpu", 3), pytest.param("cuda", 3, marks=pytest.mark.gpu)])
def test_engine_benchmark_end_to_end(tiny, capsys, device, batch):
    (document,) = engine.run("tiny", ["16x3", "4x2"], [batch], 4, 2, device, "float32", quiet=False)
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == document
    assert "roofline of 16x3" in printed.err
    assert printed.err.index("GB/s") < printed.err.index("roofline") < printed.err.index("transformers")
    assert {"geometry": "tiny", "dtype": "float32", "batch": batch, "prompt_tokens": 16 + 40, "new_tokens": 4,
            "repeats": 2}.items() <= document.items()  # fmt: skip
    assert list(document["routes"]) == list(document["roofline"]["routes"]) == ["16x3", "4x2"]
    for name, route in document["routes"].items():
        assert set(route) == {
            "ttft_s", "tpot_s", "tokens_per_s", "requests_per_s", "ttft_speedup", "tpot_speedup", "requests_speedup",
            "ttft_over_roofline", "tpot_over_roofline", "encode_s", "route_s", "prefill_s", "kv_bytes", "flops_ratio",
            "router_flops_ratio", "prefill_over_flops",
        }  # fmt: skip
        assert all(value > 0 for key, value in route.items() if key != "router_flops_ratio"), name
        assert route["ttft_s"] >= max(route[part] for part in ("encode_s", "route_s", "prefill_s"))
        assert route["tokens_per_s"] == pytest.approx(batch / route["tpot_s"], rel=1e-2)
    assert set(document["transformers"]) == {"ttft_s", "tpot_s", "tokens_per_s", "requests_per_s"}
    assert document["peak_bytes"] > document["weight_bytes"] > document["transformers_only_bytes"] > 0
    assert document["peak_over_weights"] == pytest.approx(document["peak_bytes"] / document["weight_bytes"], rel=1e-2)


def test_a_router_of_real_size_chooses_the_tokens_and_is_counted(tiny, capsys):
    (document,) = engine.run("tiny", ["16x3", "4x2"], [2], 3, 1, "cpu", "float32", quiet=False, routed=True)
    routes = document["routes"]
    assert routes["16x3"]["router_flops_ratio"] == 0 < routes["4x2"]["router_flops_ratio"]
    assert routes["4x2"]["route_s"] > routes["16x3"]["route_s"]
    rows = {name: 40 + int(name.split("x")[0]) + 2 for name in routes}
    assert routes["4x2"]["kv_bytes"] / routes["16x3"]["kv_bytes"] == rows["4x2"] * 2 / (rows["16x3"] * 3)
    assert "router" in capsys.readouterr().err


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.7, "unstructured"), (0.5, "2:4")])
def test_pruned_weights_run_beside_dense_ones(tiny, capsys, sparsity, pattern):
    (document,) = engine.run("tiny", ["4x3"], [2], 3, 2, "cpu", "bfloat16", quiet=False, sparsity=sparsity, pattern=pattern)
    assert "of the dense bytes" in capsys.readouterr().err
    assert list(document["routes"]) == list(document["roofline"]["routes"]) == ["4x3", "4x3 sparse"]
    sparse = document["sparse"]
    assert (sparse["sparsity"], sparse["pattern"], list(document["over_dense"])) == (sparsity, pattern, ["4x3"])
    assert sparse["zeros"] == pytest.approx(sparsity, abs=0.02)
    assert all(value > 0 for value in document["over_dense"]["4x3"].values())
    if kernels.library():
        assert sparse["weight_bytes"]["packed"] > 0
        assert sparse["matrix_bytes_ratio"] < 0.85  # rows this short carry much beside their weights


def test_structured_pruning_makes_all_matrices_smaller(tiny, capsys):
    (document,) = engine.run("tiny", ["16x3"], [1], 3, 1, "cpu", "float32", quiet=False, sparsity=0.5, pattern="structured")
    assert "50.0% of heads and neurons gone" in capsys.readouterr().err
    routes, bounds = document["routes"], document["roofline"]["routes"]
    assert document["sparse"]["matrix_bytes_ratio"] == pytest.approx(0.5, abs=0.02)
    assert routes["16x3 sparse"]["kv_bytes"] * 2 == routes["16x3"]["kv_bytes"]
    assert bounds["16x3 sparse"]["ttft_s"] < bounds["16x3"]["ttft_s"]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_weights_run_beside_dense_ones(tiny, capsys, kind):
    pytest.importorskip("bitsandbytes")
    (document,) = engine.run("tiny", ["4x3"], [2], 3, 2, "cpu", "bfloat16", quiet=False, quantization=kind)
    assert f"{kind}: language matrices take" in capsys.readouterr().err
    assert list(document["routes"]) == ["4x3", f"4x3 {kind}"]
    assert document["quantized"]["format"] == kind
    assert document["quantized"]["weight_bytes"].keys() == {"dense", kind}, "the head stays as it is"
    assert document["quantized"]["matrix_bytes_ratio"] < {"int8": 0.6, "nf4": 0.35}[kind]
    assert all(value > 0 for value in document["quantized_over_dense"]["4x3"].values())
    assert document["sparse"] is None


def test_quiet_prints_a_document_a_batch_alone(tiny, capsys):
    engine.run("tiny", ["4x3"], [1, 2], 2, 1, "cpu", "float32", quiet=True)
    printed = capsys.readouterr()
    assert [json.loads(line)["batch"] for line in printed.out.splitlines()] == [1, 2]
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
     ({"sparsity": 0.5, "pattern": "4:8"}, "unstructured, 2:4, structured"), ({"sparsity": 0.6, "pattern": "2:4"}, "0.5, not 0.6"),
     ({"pattern": "2:4"}, "0.5, not None")],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_before_anything_is_made(option, message, monkeypatch):
    monkeypatch.setattr(engine, "random_model", pytest.fail)
    monkeypatch.setattr(roofline, "measure", pytest.fail)
    options = {"geometry": "tinyllava-1.1b", "routes": None, "device": "cpu", "dtype": "bfloat16"} | option
    with pytest.raises(ValueError, match=message):
        engine.run(**options, batches=[1], new_tokens=2, repeats=1, quiet=True)
