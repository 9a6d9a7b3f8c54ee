"""Weights in 8 and 4 bits: bitsandbytes' own modules as the reference, the traps of its products, checkpoints that hold them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models.quantized as quantized_module
from checkpoints.shipped import resolve
from evals import exam, inspect
from evals.tasks import open_task
from models import kernels
from models.checkpoint import load, open_transformers
from models.errors import CheckpointError
from models.families import layout_of
from models.forward import forward, prefill_input
from models.linear import Linear
from models.llava import Llava, from_transformers
from models.quantized import QUANTIZED, Int8Linear, Nf4Linear, bitsandbytes, dequantize_4bit
from models.random_llava import random_model, tiny_config
from models.route import Route
from tests.models.hub import hub_config, write_hub
from tests.models.saved import edit, fails, put, saved_checkpoint  # noqa: F401
from tests.models.tiny_llava import Session, greedy, pixels, prompt

pytest.importorskip("bitsandbytes")

native = pytest.mark.skipif(kernels.few_bits_library() is None, reason="needs AVX-512 with VNNI")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(dtype: torch.dtype, outputs: int = 96, inputs: int = 128) -> Tensor:
    """Half of it zeros; one row and one block are all zeros, as pruning leaves them."""
    values = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * 0.02
    values[:, ::2] = 0
    values[5] = 0
    values[40:50, 64:] = 0
    return values.to(dtype)


def rows(dtype: torch.dtype, count: int = 7) -> Tensor:
    """With an outlier, and a row of zeros."""
    x = torch.randn(count, 128, generator=torch.Generator().manual_seed(1))
    x[2, 3] = 40
    x[4] = 0
    return x.to(dtype)


# ---- the products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_products_are_near_the_dense_ones(kind, dtype):
    bias = torch.randn(96, generator=torch.Generator().manual_seed(2)).to(dtype)
    matrix, x = QUANTIZED[kind].of(Linear(weight(dtype), bias)), rows(dtype)
    expected = Linear(weight(dtype).float(), bias.float())(x.float())
    got = matrix(x).float()
    error = (got - expected).norm() / (expected - bias.float()).norm()
    assert error < {"int8": 0.02, "nf4": 0.12}[kind]
    assert torch.equal(got[4], bias.float()), "a row of zeros gives the bias"
    torch.testing.assert_close(got[:, 5], bias[5].float().expand(7))
    assert matrix(x[None].expand(2, -1, -1)).shape == (2, 7, 96)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_zeros_stay_and_small_weights_join_them(kind):
    dense = weight(torch.bfloat16)
    dense[0, 1] = 1e-6
    matrix = QUANTIZED[kind].of(Linear(dense))
    product = matrix(torch.eye(128, dtype=torch.bfloat16)).T
    assert not product[dense == 0].any()
    assert product[0, 1] == 0
    assert matrix.size == dense.numel()
    assert matrix.nonzeros < dense.count_nonzero()
    assert matrix.bytes / dense.nbytes < {"int8": 0.53, "nf4": 0.29}[kind]


def test_a_row_of_zeros_has_no_scale_and_divides_by_nothing():
    """bitsandbytes multiplies by 127 / 0 there, and casts what is no number to an integer."""
    matrix = Int8Linear.of(Linear(torch.zeros(3, 64)))
    assert matrix.nonzeros == 0
    assert torch.equal(matrix(torch.randn(2, 64)), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_product_leaves_the_weight_as_it_is(kind, dtype):
    """bitsandbytes' module repacks its weight in the first product on CPUs with AVX512-BF16."""
    matrix = QUANTIZED[kind].of(Linear(weight(dtype)))
    held = vars(matrix) | vars(getattr(matrix, "state", matrix))
    before = {name: value.clone() for name, value in held.items() if isinstance(value, Tensor)}
    first, second = matrix(rows(dtype)), matrix(rows(dtype))
    held = vars(matrix) | vars(getattr(matrix, "state", matrix))
    assert all(torch.equal(held[name], value) for name, value in before.items())
    assert torch.equal(first, second)


@native
@pytest.mark.parametrize("many_rows", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [1, 7, 60])
def test_native_4_bits_are_the_weight_that_the_library_unpacks(monkeypatch, count, many_rows):
    """Multiplied as they are, and unpacked before."""
    monkeypatch.setattr(kernels, "many_rows", lambda: many_rows)
    dense, x = weight(torch.bfloat16), torch.randn(count, 128).bfloat16()
    matrix = Nf4Linear.of(Linear(dense))
    assert matrix.native
    unpacked = dequantize_4bit(*bitsandbytes().functional.quantize_4bit(dense, blocksize=64, quant_type="nf4"), torch.bfloat16)
    torch.testing.assert_close(matrix(x), Linear(unpacked)(x), rtol=0.01, atol=0.01)
    torch.testing.assert_close(matrix(x.float()), x.float() @ unpacked.float().T)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_rows_product_does_not_depend_on_its_batch(kind):
    matrix, x = QUANTIZED[kind].of(Linear(weight(torch.float32))), rows(torch.float32)
    together = matrix(x)
    for row in range(len(x)):
        torch.testing.assert_close(matrix(x[row : row + 1]), together[row : row + 1], rtol=1e-5, atol=1e-6)


# ---- whole models


def with_their_modules(model: Any, kind: str, outlier: float) -> Any:
    """transformers' model with bitsandbytes' modules for every matrix but the head, as `BitsAndBytesConfig` would have it."""
    library = bitsandbytes()
    for name, module in [*model.named_modules()]:
        if type(module) is not nn.Linear or name == "lm_head":
            continue
        weight, bias = module.weight.data, module.bias
        if kind == "int8":
            made = library.nn.Linear8bitLt(*weight.T.shape, bias is not None, has_fp16_weights=False, threshold=outlier)
            made.weight = library.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False).to("cpu")
            codes, scales, _ = library.functional.int8_vectorwise_quant(weight.half())
            made.state.CB, made.state.SCB = codes, scales
            made.weight.CB, made.weight.SCB = codes, scales
        else:
            made = library.nn.Linear4bit(*weight.T.shape, bias is not None, compute_dtype=weight.dtype, quant_type="nf4",
                                         compress_statistics=False)  # fmt: skip
            options = {"requires_grad": False, "compress_statistics": False, "quant_type": "nf4"}
            made.weight = library.nn.Params4bit(weight, **options)._quantize("cpu")
        made.bias = bias
        model.set_submodule(name, made.eval())
    return model


@pytest.mark.parametrize(
    ("kind", "outlier", "dtype", "share", "tie"),
    [
        ("int8", 0.0, torch.float32, 1e-4, 0.2),
        ("int8", 6.0, torch.float32, 0.5, torch.inf),
        ("nf4", 0.0, torch.bfloat16, 0.1, 0.2),
    ],
)
def test_answers_are_those_of_bitsandbytes_modules(monkeypatch, kind, outlier, dtype, share, tie):
    """Twenty prompts: by the median, logits differ by at most a `share` of what quantizing moves them. Where no input counts as an
    outlier int8 is the same arithmetic, but for a code that attention's last digits turn into another; ours and theirs count
    outliers differently. NF4 in bfloat16, in which their CPU product always computes."""
    monkeypatch.setattr(quantized_module, "OUTLIER", outlier or torch.inf)
    if kind == "int8":  # the last digits of our own product differ, and with them a code in thousands
        monkeypatch.setattr(kernels, "few_bits_library", lambda: None)
    config = tiny_config("qwen2")
    for part in (config.text_config, config.vision_config):  # their CPU product wants rows of whole blocks
        part.hidden_size, part.intermediate_size, part.num_attention_heads = 64, 128, 4
    config.text_config.initializer_range = 0.2  # so that answers differ
    dense, quantized = (from_transformers(random_model(config, 1, dtype), held) for held in (None, kind))
    theirs = with_their_modules(random_model(config, 1, dtype), kind, outlier)
    differ, moved, tokens = [], [], []
    for seed in range(20):
        ids, pics = prompt(1, 5 + seed, seed), pixels(1, seed).to(dtype)
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor([ids]), pixel_values=pics).logits[0, -1].float()
        got, before = (forward(model, [Session(model, ids, pics).input])[0] for model in (quantized, dense))
        differ.append((got - expected).norm())
        moved.append((before - expected).norm())
        first, second = expected.topk(2).values
        if first - second > tie:
            assert int(got.argmax()) == int(expected.argmax()), seed
            tokens.append(int(got.argmax()))
    assert median(differ) < share * median(moved)
    assert tie == torch.inf or (len(tokens) >= 14 and len(set(tokens)) > 5)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_8_bits_move_answers_no_further_than_torchs(monkeypatch, dtype):
    config = tiny_config("qwen2")
    config.text_config.initializer_range = 0.2
    dense, quantized = (from_transformers(random_model(config, 1, dtype), held) for held in (None, "int8"))
    asked = [(prompt(1, 5 + seed, seed), pixels(1, seed).to(dtype)) for seed in range(100)]

    def logits(model: Llava) -> Tensor:
        return torch.cat([forward(model, [Session(model, *one).input]) for one in asked])

    expected, native = logits(dense), logits(quantized)
    monkeypatch.setattr(kernels, "few_bits_library", lambda: None)
    assert 0 < (native - expected).norm() < 1.1 * (logits(quantized) - expected).norm()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_mixed_batch_answers_as_each_request_alone(kind):
    model = from_transformers(random_model(tiny_config(), seed=1), kind)
    asked = [(prompt(1, 3 + seed, seed), pixels(1, seed)) for seed in range(4)]
    alone = [greedy([Session(model, *one)], 8)[0] for one in asked]
    assert greedy([Session(model, *one) for one in asked], 8) == alone


@pytest.mark.parametrize("kind", QUANTIZED)
def test_all_matrices_but_the_head_are_quantized(kind):
    model = from_transformers(random_model(tiny_config(), seed=1), kind)
    assert {name: matrix.format for name, matrix in model.linears().items()} == {
        name: "dense" if name == "head" else kind for name in model.linears()
    }
    assert set(model.bytes_by_format()) == {"dense", kind}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_tied_embedding_is_held_once_in_8_bits(kind):
    """In `smol` it is a fifth of all weights, and more than nf4 leaves of the others."""
    config = tiny_config("qwen2")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    config.text_config.initializer_range = 0.2
    dense, model = (from_transformers(random_model(config, 1), held) for held in (None, kind))
    assert isinstance(model.head, Int8Linear) and model.embedding is model.head
    assert set(model.bytes_by_format()) == {"dense", "int8", kind}
    assert model.weight_bytes == sum(matrix.bytes for matrix in model.linears().values()) + model.vision.tower.other_bytes
    assert (model.dtype, model.device) == (dense.dtype, dense.device)
    ids, hidden = torch.tensor([3, 40, 127]), torch.randn(5, 48)
    torch.testing.assert_close(model.embed(ids), dense.embed(ids), rtol=0, atol=float(dense.embedding.abs().max()) / 253)
    error = (model.logits(hidden) - dense.logits(hidden)).norm() / dense.logits(hidden).norm()
    assert 0 < error < 0.02


# ---- checkpoints that are quantized already


def quantize_saved(directory: Path, kind: str, *, nested: bool = False, skip: str = "lm_head") -> None:
    """What `save_pretrained` writes of a model with bitsandbytes' modules."""
    functional = bitsandbytes().functional
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if tensor.dim() != 2 or not name.endswith("weight") or any(part in name for part in ("embed", "lm_head", skip)):
            tensors[name] = tensor
        elif kind == "int8":
            codes, scales, _ = functional.int8_vectorwise_quant(tensor.half())
            tensors |= {name: codes, f"{name.removesuffix('weight')}SCB": scales}
            tensors[f"{name}_format"] = torch.tensor(0, dtype=torch.uint8)
        else:
            codes, state = functional.quantize_4bit(tensor, blocksize=64, quant_type="nf4", compress_statistics=nested)
            tensors |= {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    about = {"quant_method": "bitsandbytes", "load_in_8bit": kind == "int8", "bnb_4bit_quant_type": "nf4"}
    edit(directory / "config.json", put("quantization_config", value=about))


def logits(model: Llava, config: Any) -> Tensor:
    ids = [1, *[config.image_token_index] * 16, 40, 41, 42]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    visual, route = model.encode(pixels, layout_of(config, 32, 32)).tokens[0], Route.full(16, model.num_layers)
    return forward(model, [prefill_input(model, torch.tensor(ids), visual, route, model.new_cache(route.rows(len(ids))))])


@pytest.mark.parametrize(("kind", "nested"), [("int8", False), ("nf4", False), ("nf4", True)])
def test_a_quantized_checkpoint_loads_as_what_it_is(tmp_path, kind, nested):
    config = hub_config("llava", "llama", "siglip")
    dense, saved = write_hub(tmp_path / "dense", config), write_hub(tmp_path / "saved", config)
    quantize_saved(saved, kind, nested=nested)
    loaded, expected = load(saved), load(dense, quantization=kind)
    assert loaded.quantization == expected.quantization == kind
    assert loaded.model.bytes_by_format() == expected.model.bytes_by_format()
    close = {"rtol": 0.05, "atol": 0.05} if nested else {"rtol": 1e-4, "atol": 1e-4}  # nested scales are rounded themselves
    torch.testing.assert_close(logits(loaded.model, config), logits(expected.model, config), **close)


def test_a_tied_embedding_that_was_left_dense_stays_dense(tmp_path):
    config = hub_config("llava")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    saved = write_hub(tmp_path / "saved", config)
    quantize_saved(saved, "nf4")
    model = load(saved).model
    assert isinstance(model.embedding, Tensor) and model.head.format == "dense"
    assert load(write_hub(tmp_path / "dense", config), quantization="nf4").model.head.format == "int8"


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize(
    ("skip", "dense"),
    [("vision_tower", "vision"), ("model.model.layers.0", "language.0"), ("model.layers.1.self_attn.v_proj", "language.1.qkv")],
)
def test_what_was_left_dense_stays_dense(tmp_path, kind, skip, dense):
    saved = write_hub(tmp_path / "saved", hub_config("llava"))
    quantize_saved(saved, kind, skip=skip)
    formats = {name: matrix.format for name, matrix in load(saved).model.linears().items() if name != "head"}
    assert any(name.startswith(dense) for name in formats)
    assert formats == {name: "dense" if name.startswith(dense) else kind for name in formats}


# ---- what is refused


@pytest.fixture(scope="module", name="quantized")
def quantized_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_hub(tmp_path_factory.mktemp("quantized") / "nf4", hub_config("llava"))
    quantize_saved(directory, "nf4")
    return directory


def test_weights_of_one_format_do_not_become_another(quantized):
    with pytest.raises(CheckpointError, match="holds nf4 weights, which do not become int8"):
        load(quantized, quantization="int8")
    assert load(quantized, quantization="nf4").quantization == "nf4"


def test_quantized_weights_are_not_pruned(quantized):
    with pytest.raises(CheckpointError, match="holds nf4 weights, which cannot be changed; take the dense checkpoint"):
        open_transformers(quantized)


def test_an_unknown_format_is_named(saved):
    with pytest.raises(CheckpointError, match="quantization 'int4' is not one of int8, nf4"):
        load(saved, quantization="int4")


def test_it_is_said_what_to_install(saved, monkeypatch):
    bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(CheckpointError, match=r"pip install -e '\.\[quant\]'"):
        load(saved, quantization="nf4")
    assert load(saved).quantization is None


@native
def test_8_bits_on_a_cpu_need_no_library(saved, monkeypatch):
    bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = load(saved, quantization="int8").model
    assert len(greedy([Session(model, prompt(0, 5, 1), None)], 4)[0]) == 4
    with pytest.raises(CheckpointError, match="bitsandbytes"):
        load(saved, dtype="float16", quantization="int8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq' is not supported"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "'fp4' is not supported; nf4 is"),
    ],
)
def test_other_quantized_checkpoints_are_refused(tmp_path, change, words):
    directory = write_hub(tmp_path / "other", hub_config("llava"))
    edit(directory / "config.json", put("quantization_config", value=change))
    fails(directory, words)


def test_scales_that_are_missing_are_named(tmp_path):
    directory = write_hub(tmp_path / "broken", hub_config("llava"))
    quantize_saved(directory, "int8")
    tensors = {name: tensor for name, tensor in load_file(directory / "model.safetensors").items() if not name.endswith("SCB")}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    fails(directory, "is quantized and its scales are missing")
    assert json.loads((directory / "config.json").read_text())["quantization_config"]["load_in_8bit"]


# ---- the shipped checkpoint, whose weights are half zeros, and the commands


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.6), ("nf4", 0.35)])
def test_half_pruned_weights_are_served_in_few_bits(kind, share, capsys):
    loaded, dense = load(resolve("embedded"), quantization=kind), load(resolve("embedded-dense"))
    assert loaded.model.weight_bytes < share * dense.model.weight_bytes
    sparsity = loaded.model.sparsity()["language"]
    assert sparsity >= load(resolve("embedded")).model.sparsity()["language"] > 0.49, "masks survive, and small weights join them"
    task = open_task("scenes", 12, split="validation")
    document = exam.run(resolve("embedded"), task, "balanced", None, "cpu", "auto", True, kind)
    assert document["accuracy"] > 0.8
    assert (document["quantization"], document["weight_bytes"]) == (kind, loaded.model.weight_bytes)
    inspect.run(resolve("embedded"), quantization=kind)
    told = capsys.readouterr().out
    assert f"weights: dense 0.7 MB, {kind}" in told
