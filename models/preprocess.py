"""From a chat and its pictures to token ids and pixels, by the checkpoint's own processor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import decoders
from transformers import LlavaProcessor, PreTrainedConfig

from models.families import Layout, family_of, layout_of

# What stands for each byte in a byte-level vocabulary (GPT-2): itself where it prints, else the next code from 256 on.
_PRINTS = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTS]
_BYTE_OF = {chr(byte): byte for byte in _PRINTS} | {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece's byte tokens
MAX_SCALE = 16
"""How much longer than the tower's picture a processor's may be: it is cut to the middle, or into tiles."""
# Splits a special token's spelling in user text, so that it is read as text; a private-use character nobody types.
_BREAK = "\ue000"


def _begins_one_of(specials: Iterable[str]) -> re.Pattern[str]:
    """Matches the first character of a special token, and of what may become one when a template joins the text with another."""

    def begins(special: str) -> str:
        rest = ""
        for char in reversed(special[1:]):
            rest = rf"(?:\s*\Z|{re.escape(char)}{rest})"
        return f"{re.escape(special[0])}(?={rest})"

    return re.compile("|".join(begins(special) for special in sorted(specials) if len(special) > 1) or r"(?!)")


def _check_sizes(image_processor: Any, config: PreTrainedConfig) -> None:
    """Before any picture is made so large."""
    most = MAX_SCALE * int(config.vision_config.image_size)
    sizes = {name: [*dict(getattr(image_processor, name, None) or {}).values()] for name in ("size", "crop_size", "pad_size")}
    sizes["image_grid_pinpoints"] = [*chain(*(getattr(image_processor, "image_grid_pinpoints", None) or ()))]
    for name, values in sizes.items():
        if (largest := max(filter(None, values), default=0)) > most:
            told = f"over {MAX_SCALE} times what the tower takes"
            raise ValueError(f"{name} of preprocessor_config.json is {largest:,} pixels, {told}")


def _check_tiles(image_processor: Any, config: PreTrainedConfig) -> None:
    if not family_of(config).tiled:
        return
    wanted, made = (sorted(map(list, grids)) for grids in (config.image_grid_pinpoints, image_processor.image_grid_pinpoints))
    if wanted != made:
        raise ValueError("image_grid_pinpoints of preprocessor_config.json and of config.json differ; a picture must fit both")


def _only_resizes(image_processor: Any) -> bool:
    """Whether a picture is made one size by Pillow, whatever its shape, and its values are rescaled and normalised; no more."""
    size = image_processor.size
    return (
        type(image_processor).__name__ in ("CLIPImageProcessorPil", "SiglipImageProcessorPil")
        and image_processor.do_resize and image_processor.do_rescale and image_processor.do_normalize
        and not getattr(image_processor, "do_center_crop", False) and bool(size.height and size.width)
    )  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture as the vision tower takes it, `pixels` [tiles, 3, height, width] float32, and how its visual tokens will lie."""

    pixels: torch.Tensor
    layout: Layout


class Preprocessor:
    """Raises ValueError for a processor that makes other pictures than the configuration's tower takes."""

    def __init__(self, processor: LlavaProcessor, config: PreTrainedConfig) -> None:
        self.tokenizer = processor.tokenizer
        self.tiled = family_of(config).tiled
        self.center_crop = bool(getattr(processor.image_processor, "do_center_crop", False)) and not self.tiled
        self._processor, self._config = processor, config
        _check_sizes(processor.image_processor, config)
        _check_tiles(processor.image_processor, config)
        self._only_resizes = not self.tiled and _only_resizes(processor.image_processor)
        self._image_id = int(config.image_token_index)
        # Those that the tokenizer names (beginning, end), and those that it merely turns into one id wherever they stand.
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self._special_ids = frozenset(
            {*self.tokenizer.all_special_ids, *(id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special)}
        )
        self._byte_level = isinstance(self.tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
        self._begins_special = _begins_one_of({*added, *self.tokenizer.all_special_tokens})

    def picture(self, image: Image.Image, *, alone: bool = True) -> Picture:
        """An RGB picture, resized, cut into tiles if that is the family's way, and normalised. `alone` in its prompt or not: some
        families have no tiles of a picture that is one of several."""
        layout = self.layout(image.height, image.width, alone=alone)
        if self._only_resizes:
            return Picture(self._resized(image)[None], layout)
        whole = self.tiled and layout.tiles == 1
        # A processor that is given several pictures of one prompt makes no tiles of them.
        batch = self._processor.image_processor([[image, image]] if whole else image, return_tensors="pt")
        pixels = batch["pixel_values"][0].float()
        return Picture(pixels if pixels.dim() == 4 else pixels[None], layout)

    def _resized(self, image: Image.Image) -> torch.Tensor:
        """What the processor makes, bit for bit, without its copies of the picture: half the time."""
        made = self._processor.image_processor
        small = image.resize((made.size.width, made.size.height), made.resample)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous().float()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (made.image_mean, made.image_std))
        return pixels.div_(1 / made.rescale_factor).sub_(mean).div_(std)

    def layout(self, height: int, width: int, *, alone: bool = True) -> Layout:
        """How the visual tokens of a picture will lie."""
        return layout_of(self._config, height, width, alone=alone)

    @property
    def image_side(self) -> int:
        """The largest side, in pixels, that a picture is made for the tower."""
        grids = self._config.image_grid_pinpoints if self.tiled else ()
        return max([int(self._config.vision_config.image_size), *(side for grid in grids for side in grid)])

    def prompt(
        self, messages: list[dict[str, Any]], layouts: Sequence[Layout] | None = None, *, generation: bool = True,
        continued: bool = False,
    ) -> list[int]:  # fmt: skip
        """Render a chat (transformers' message format) and tokenise it; each image becomes its visual tokens, as many as its layout
        says. `layouts` may be left out where no picture is tiled.

        `generation` lets the assistant's turn begin; `continued` ends within the last message, which must be text.

        A special token spelled out in messages, `<image>` among them, stays text, also where a template joins two parts. Raises
        ValueError if the chat template refuses the messages or loses an image.
        """
        guarded = [{**message, "content": self._guard(message["content"])} for message in messages]
        try:
            text = self._processor.apply_chat_template(
                guarded, add_generation_prompt=generation, continue_final_message=continued
            )
        except Exception as error:  # templates raise jinja2's own errors, with a message meant for the caller
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        ids = self._tokenize(text)
        asked = sum(part["type"] == "image" for message in messages for part in message["content"] if isinstance(part, dict))
        if (found := self.count_images(ids)) != asked:
            raise ValueError(f"the chat template makes {found} image tokens of {asked} images")
        return self._expand(ids, [self.untiled] * asked if layouts is None else layouts)

    @property
    def untiled(self) -> Layout:
        """The layout of any picture, where none is tiled. Raises ValueError where they are."""
        if self.tiled:
            raise ValueError("how many visual tokens a picture has depends on its size: layouts are needed")
        return layout_of(self._config, 1, 1)

    def question(self, text: str, history: Sequence[tuple[str, str]] = (), layout: Layout | None = None) -> list[int]:
        """The prompt of one question about one picture; `history` are the questions and answers that it follows."""
        texts = [*(each for turn in history for each in turn), text]
        messages: list[dict[str, Any]] = [
            {"role": ("user", "assistant")[number % 2], "content": [{"type": "text", "text": each}]}
            for number, each in enumerate(texts)
        ]
        messages[0]["content"].insert(0, {"type": "image"})
        return self.prompt(messages, None if layout is None else [layout])

    def answered(
        self, question: str, answer: str, layouts: Sequence[Layout] | None = None, images: int = 1
    ) -> tuple[list[int], list[int], list[int]]:
        """One question about pictures and its answer, as the chat template writes them: tokens before the answer's first, those of
        its text, and the one that ends it.

        That is the template's own, if a special token stands behind the text, and otherwise the tokenizer's, which models learn to
        say where templates, like LLaVA-1.5's, write only a blank.
        """
        asked: list[dict[str, Any]] = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        prompt, whole = self.prompt(chat[:1], layouts), self.prompt(chat, layouts, generation=False)
        said = self.prompt(chat, layouts, generation=False, continued=True) if answer.strip() else prompt
        start = len([*takewhile(lambda pair: pair[0] == pair[1], zip(prompt, said, strict=False))])
        behind = [token for token in whole[len(said) : len(said) + 1] if token in self._special_ids]
        end = behind or [token for token in [self.tokenizer.eos_token_id] if token is not None]
        return said[:start], said[start:], end

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """A text to ids as it stands, special tokens read as such; `special` begins it as the tokenizer begins a text."""
        return list(self.tokenizer(text, add_special_tokens=special).input_ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids))

    def count_images(self, ids: Sequence[int]) -> int:
        """Image tokens among `ids`."""
        return sum(token == self._image_id for token in ids)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text, byte for byte, half characters and leading blanks included; of a special token, nothing.

        For the two families of tokenizers that LLaVA's language models have: byte-level, and SentencePiece with byte tokens.
        """
        if token in self._special_ids or not 0 <= token < self.vocab_size:
            return b""
        if (added := self.tokenizer.added_tokens_decoder.get(token)) is not None:
            return str(added).encode()
        spelling: str = self.tokenizer.convert_ids_to_tokens(token)
        if self._byte_level:
            return bytes(_BYTE_OF[char] for char in spelling)
        if _BYTE_TOKEN.fullmatch(spelling):
            return bytes([int(spelling[3:5], 16)])
        return spelling.replace("\u2581", " ").encode()

    def token_text(self, token: int) -> str:
        """A token's name: its text, or what it is called if it is a special one."""
        if token in self._special_ids:
            return str(self.tokenizer.convert_ids_to_tokens(token))
        return self.token_bytes(token).decode(errors="replace")

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    def _tokenize(self, text: str) -> list[int]:
        first, *rest = text.split(_BREAK)
        bos = self.tokenizer.bos_token
        # Some templates write the beginning-of-sequence token themselves; it must not stand there twice.
        ids = list(self.tokenizer(first, add_special_tokens=not (bos and first.startswith(bos))).input_ids)
        for piece in rest:
            ids += self.tokenizer(piece, add_special_tokens=False).input_ids
        return ids

    def _guard(self, content: Any) -> Any:
        if isinstance(content, str):
            return self._guard_text(content)
        return [{**part, "text": self._guard_text(part["text"])} if part["type"] == "text" else part for part in content]

    def _guard_text(self, text: str) -> str:
        return self._begins_special.sub(lambda found: found[0] + _BREAK, text.replace(_BREAK, ""))

    def _expand(self, ids: list[int], layouts: Sequence[Layout]) -> list[int]:
        counts = iter([layout.visual_tokens for layout in layouts])
        out: list[int] = []
        for token in ids:
            out += [token] * (next(counts) if token == self._image_id else 1)
        return out
