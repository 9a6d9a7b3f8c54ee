"""One system of `benchmarks.peers`, in a process of its own: it may need an interpreter and packages that we do not have.

    python -P peer_worker.py SYSTEM DIRECTORY

It loads the checkpoint in DIRECTORY and prints `ready`. Then it reads lines of `requests new_tokens`, answers so many requests at
once, each of its own picture, and prints the seconds from pictures and text to the last token. What it imports is the system's own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Answer = Callable[[list[Any], int], object]
"""Answers about pictures [336, 336, 3] of bytes with so many tokens each, greedily."""

QUESTION = "What is in the picture? Say where each thing is and what it does."
PROMPT = f"USER: <image>\n{QUESTION} ASSISTANT:"


def espalier(directory: Path, level: str = "off", patch_ratio: float = 1.0, quantization: str | None = None) -> Answer:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from transformers import AutoProcessor

    from benchmarks.runners import EspalierRunner, Prompts
    from models.checkpoint import load
    from models.route import Route
    from pruning.dynamic.levels import fixed_menu

    model, processor = load(directory, quantization=quantization).model, AutoProcessor.from_pretrained(directory)
    (point,) = fixed_menu(None, model.num_layers)[level].operating_points
    visual = model.visual_tokens_per_image
    route = Route(visual, tuple(range(point.kept(visual))), (True,) * model.num_layers)
    runner = EspalierRunner(model, route, merging=True, patch_ratio=patch_ratio)

    def answer(pictures: list[Any], new_tokens: int) -> None:
        inputs = processor(text=[PROMPT] * len(pictures), images=pictures, return_tensors="pt")
        runner.run(Prompts(inputs["input_ids"], inputs["pixel_values"].to(model.dtype)), new_tokens)

    return answer


def transformers(directory: Path) -> Answer:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto")
    processor = AutoProcessor.from_pretrained(directory)

    def answer(pictures: list[Any], new_tokens: int) -> None:
        inputs = processor(text=[PROMPT] * len(pictures), images=pictures, return_tensors="pt").to(torch.bfloat16)
        model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, eos_token_id=None)

    return answer


def vllm(directory: Path) -> Answer:
    # By itself it leaves one core to its scheduler, and takes one thread of each other core.
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
    from PIL import Image
    from vllm import LLM, SamplingParams

    renamed = _renamed(directory, directory / "vllm")
    model = LLM(
        str(renamed), dtype="bfloat16", max_model_len=1024, max_num_seqs=16, mm_processor_kwargs={"backend": "pil"},
        gpu_memory_utilization=0.25,  # of the machine's memory, on a CPU too; the others take some of it
    )  # fmt: skip

    def answer(pictures: list[Any], new_tokens: int) -> None:
        prompts = [{"prompt": PROMPT, "multi_modal_data": {"image": Image.fromarray(picture)}} for picture in pictures]
        model.generate(prompts, SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=0), use_tqdm=False)

    return answer


def openvino(directory: Path) -> Answer:
    import openvino as ov
    import openvino_genai as genai

    pipeline = genai.VLMPipeline(str(_exported(directory, directory / "openvino")), "CPU")

    def answer(pictures: list[Any], new_tokens: int) -> None:
        config = genai.GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        for picture in pictures:  # the pipeline takes one request at a time
            pipeline.generate(QUESTION, images=[ov.Tensor(picture[None])], generation_config=config)

    return answer


SYSTEMS: dict[str, Callable[[Path], Answer]] = {
    "espalier": espalier, "espalier at strong": partial(espalier, level="strong"),
    "espalier at strong, half of the patches": partial(espalier, level="strong", patch_ratio=0.5),
    "espalier, int8": partial(espalier, quantization="int8"),
    "espalier at strong, half of the patches, int8": partial(espalier, level="strong", patch_ratio=0.5, quantization="int8"),
    "transformers": transformers, "vllm": vllm, "openvino": openvino,
}  # fmt: skip


def _renamed(source: Path, target: Path) -> Path:
    """A copy whose vision tower has the names that vLLM 0.32 looks for."""
    import shutil

    from safetensors.torch import load_file, save_file

    target.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, target)
    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = load_file(source / "model.safetensors")
    renamed = {name if new in name else name.replace(old, new): weight for name, weight in weights.items()}
    save_file(renamed, target / "model.safetensors", {"format": "pt"})
    return target


def _exported(source: Path, target: Path) -> Path:
    """The checkpoint in OpenVINO's format, by optimum-intel."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel.openvino import OVModelForVisualCausalLM
    from transformers import AutoProcessor

    OVModelForVisualCausalLM.from_pretrained(source, export=True, load_in_8bit=False, compile=False).save_pretrained(target)
    processor = AutoProcessor.from_pretrained(source)
    processor.save_pretrained(target)
    processor.image_processor.save_pretrained(target)
    processor.tokenizer.save_pretrained(target)  # with the chat template, which the pipeline reads here
    names = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")
    for name, part in zip(names, convert_tokenizer(processor.tokenizer, with_detokenizer=True), strict=True):
        ov.save_model(part, target / name)
    return target


def main(system: str, directory: Path) -> None:
    answer, random = SYSTEMS[system](directory), np.random.default_rng(0)
    size = json.loads((directory / "config.json").read_text())["vision_config"]["image_size"]
    answer([random.integers(0, 256, (size, size, 3), dtype=np.uint8)], 2)  # the first call pays for what later ones find ready
    say("ready")
    for line in sys.stdin:
        requests, new_tokens = map(int, line.split())
        pictures = [random.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(requests)]
        start = time.perf_counter()
        answer(pictures, new_tokens)
        say(f"seconds {time.perf_counter() - start}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
