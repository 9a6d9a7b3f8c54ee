"""Are we faster than the others? transformers, vLLM and OpenVINO on the same random weights and questions, in turn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from benchmarks.peer_worker import SYSTEMS
from benchmarks.report import finish
from models.random_llava import geometry_config, random_model

WORKER = Path(__file__).with_name("peer_worker.py")
SHORT = 2
"""Tokens of the shortest answer that every system times."""
BATCH, BATCH_TOKENS = 8, 16
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}USER: {% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %} ASSISTANT:{% endfor %}"
)


class Peer:
    """A running worker, see `peer_worker`. Raises RuntimeError with the end of its log if it fails."""

    def __init__(self, system: str, python: str, directory: Path) -> None:
        self.system, self.log = system, directory / f"{system}.log"
        with self.log.open("w") as log:
            command = [python, "-P", str(WORKER), system, str(directory)]  # -P: or our http.py would hide Python's
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        try:
            self._read("ready")
        except RuntimeError:
            self.close()
            raise
        self._rest()

    def seconds(self, requests: int, new_tokens: int) -> float:
        """Of so many requests at once, from pictures and text to the last token."""
        assert self.process.stdin is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(f"{requests} {new_tokens}\n")
        self.process.stdin.flush()
        seconds = float(self._read("seconds"))
        self._rest()
        return seconds

    def _rest(self) -> None:
        """Stop until it is asked again: vLLM's scheduler takes a core even while nothing is to be done."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def _read(self, word: str) -> str:
        """What stands behind a word on the next line that begins with it: peers print lines of their own."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise RuntimeError(f"{self.system} ended: {' '.join(self.log.read_text().split()[-40:])}")

    def close(self) -> None:
        with self.process, suppress(ProcessLookupError):  # which closes its pipes
            os.killpg(self.process.pid, signal.SIGKILL)  # vLLM's engine is a process of its own


def run(
    geometry: str, new_tokens: int, repeats: int, batch: bool, pythons: Mapping[str, str | None], quiet: bool
) -> dict[str, Any]:
    """Measure and print; the last line is one JSON document, which is returned.

    `pythons` are the interpreters of `vllm` and `openvino`; what has none is left out, and so is what does not run. All systems
    stay loaded, so that there must be memory for a copy of the weights each. Times include the preparation of pictures. Answers of
    SHORT and of `new_tokens` tokens are timed; a further token is the difference of their medians over the tokens between.
    """
    console = Console(stderr=True, quiet=quiet)
    systems = {**dict.fromkeys(SYSTEMS, sys.executable), **pythons}
    skipped = {name: "no interpreter was given" for name, python in systems.items() if not python}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="peers-")))
        write(geometry, directory)
        peers: dict[str, Peer] = {}
        for name, python in systems.items():
            if not python:
                continue
            console.print(f"loading {name}")
            try:
                peers[name] = Peer(name, python, directory)
                stack.callback(peers[name].close)
            except (OSError, RuntimeError) as error:
                skipped[name] = str(error)
        times: dict[str, dict[str, list[float]]] = {name: {"short_s": [], "answer_s": [], "batch_s": []} for name in peers}
        for _ in track(range(repeats), "measuring", console=console):
            for name, peer in peers.items():
                times[name]["short_s"].append(peer.seconds(1, SHORT))
                times[name]["answer_s"].append(peer.seconds(1, new_tokens))
                if batch:
                    times[name]["batch_s"].append(peer.seconds(BATCH, BATCH_TOKENS))
    document = {
        "geometry": geometry,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "systems": {name: summary(own, new_tokens) for name, own in times.items()},
        "skipped": skipped,
    }
    show(document, console)
    return finish(document)


def write(geometry: str, directory: Path) -> None:
    """A checkpoint of random bfloat16 weights with tokenizer and processor, as transformers saves it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate((*SPECIALS, *letters))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    unknown, start, end, padding, image = SPECIALS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=start, eos_token=end, pad_token=padding,
        extra_special_tokens={"image_token": image}, padding_side="left", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    config = geometry_config(geometry)
    config.image_token_id = fast.convert_tokens_to_ids(image)
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(fast))
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    pictures = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    LlavaProcessor(
        pictures, fast, patch_size=patch, vision_feature_select_strategy="default", image_token=image,
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)  # fmt: skip
    model = random_model(config, dtype=torch.bfloat16)
    model.lm_head.weight.data[: len(SPECIALS)] = 0  # never the likeliest, so that no system stops early
    model.save_pretrained(directory)


def summary(times: Mapping[str, list[float]], new_tokens: int) -> dict[str, Any]:
    """Median and range of what was measured, and the times of a first and of each further token."""
    short = median(times["short_s"])
    each = (median(times["answer_s"]) - short) / (new_tokens - SHORT)
    ranges = {what: {"median": median(t), "least": min(t), "most": max(t)} for what, t in times.items() if t}
    return {"ttft_s": short - (SHORT - 1) * each, "tpot_s": each, **ranges}


def show(document: dict[str, Any], console: Console) -> None:
    columns = {
        "short_s": f"{SHORT} tokens s",
        "answer_s": f"{document['new_tokens']} tokens s",
        "batch_s": f"{BATCH} × {BATCH_TOKENS} tokens s",
    }
    table = Table("system", "first token s", "per token s", *columns.values(), title=document["geometry"])
    for name, row in document["systems"].items():
        cells = [f"{row[c]['median']:.3g} ({row[c]['least']:.3g}-{row[c]['most']:.3g})" if c in row else "-" for c in columns]
        table.add_row(name, f"{row['ttft_s']:.3g}", f"{row['tpot_s']:.3g}", *cells)
    console.print(table)
    for name, reason in document["skipped"].items():
        console.print(f"{name} was left out: {reason}", markup=False)
