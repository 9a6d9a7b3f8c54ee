"""What every family of scenes shares: the scene's record, its questions, how an answer is judged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypedDict

from PIL import Image

from checkpoints.things.paraphrases import PARAPHRASES

SIZE = 544
"""Width and height of a scene, in pixels, unless another is asked for."""
NUMBERS = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty twenty-one twenty-two twenty-three twenty-four twenty-five".split()
)
PLACES = {"top left": "at the top left", "top": "at the top", "top right": "at the top right",
          "left": "on the left", "center": "in the center", "right": "on the right",
          "bottom left": "at the bottom left", "bottom": "at the bottom", "bottom right": "at the bottom right"}  # fmt: skip
"""The ninths of a picture, as one reads, and how a sentence says them."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Question:
    """`answer` is the one to learn; `accepted` are others that are as right. A question with `parts` is answered
    by naming every one of them, in any order; a list of them holds nothing else."""

    type: str
    text: str
    answer: str
    accepted: tuple[str, ...] = ()
    parts: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Mark:
    """Where something stands (left, top, right, bottom as shares of the side), what it is, and whose hand drew it, if one did."""

    box: Box
    name: str
    kind: str
    hand: str = ""

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def area(self) -> float:
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass
class Scene:
    """A picture, what is in it, and what is asked about it."""

    family: str
    image: Image.Image
    marks: list[Mark]
    questions: list[Question] = field(default_factory=list)

    @property
    def hands(self) -> tuple[str, ...]:
        """The hands that drew its things."""
        return tuple(sorted({mark.hand for mark in self.marks if mark.hand}))


class Asker:
    """Words the questions of a scene: `paraphrase` is `seen` or `held_out`."""

    def __init__(self, rng: Random, paraphrase: str) -> None:
        self.rng = rng
        self.paraphrase = paraphrase
        self.questions: list[Question] = []

    def ask(
        self,
        type_: str,
        answer: str,
        *,
        also: Iterable[str] = (),
        parts: Sequence[tuple[str, ...]] = (),
        sentence: str | None = None,
        wording: str | None = None,
        pointed: bool = False,
        **slots: str,
    ) -> None:
        """Ask one question of a type in one of its wordings (`wording` names another table of them than the type's own; `pointed`
        leaves out those that do not say which thing is meant). With a `sentence`, sometimes a whole sentence is asked for, and the
        question is then of type `<type>_sentence`."""
        wordings = [w for w in PARAPHRASES[wording or type_][self.paraphrase] if "{the}" in w or not pointed]
        text = self.rng.choice(wordings).format(**slots)
        if sentence and self.rng.random() < 0.15:
            tail = self.rng.choice(PARAPHRASES["in_a_sentence"][self.paraphrase])
            found = tuple(dict.fromkeys((answer, *also)))
            self.questions.append(Question(f"{type_}_sentence", f"{text[0].upper()}{text[1:]} {tail}", sentence, parts=(found,)))
        else:
            others = tuple(other for other in dict.fromkeys(also) if other != answer)
            self.questions.append(Question(type_, self._spoken(text), answer, others, tuple(parts)))

    def _spoken(self, text: str) -> str:
        """People are careless: some questions lose their capital or their final mark."""
        text = text[0].upper() + text[1:]
        dice = self.rng.random()
        if dice < 0.1:
            return text[0].lower() + text[1:]
        return text[:-1] if dice < 0.15 and text[-1] in "?." else text


_ARTICLES = re.compile(r"\b(a|an|the|some)\b")
_LEADS = re.compile(r"^(it is|its|this is|that is|there is|there are|they are|i see|i can see|you can see|it says|it reads)\b")
_DIGITS = {word.replace("-", " "): str(i) for i, word in enumerate(NUMBERS)}


def normalize(text: str) -> str:
    """Lower case without punctuation, articles or a lead such as "it is"; number words as digits, British spelling as American."""
    text = re.sub(r"[^\w\s]", " ", text.lower().replace("'", "").replace("-", " "))
    text = " ".join(text.split()).replace("colour", "color").replace("grey", "gray")
    bare = _ARTICLES.sub(" ", _LEADS.sub(" ", text)).split() or text.split()  # the letter A is an answer too
    return " ".join(_DIGITS.get(word, word) for word in bare)


def matches(answer: str, question: Question) -> bool:
    """Whether an answer is the expected one or one that is as right, after `normalize`; for a question with parts, whether every
    part is named, and in a list nothing else."""
    given = normalize(answer)
    if question.type == "list":
        items = [f" {normalize(item)} " for item in re.split(r",|;|\band\b", answer) if item.strip()]
        parts = [[normalize(name) for name in part] for part in question.parts]
        found = [{i for i, part in enumerate(parts) if any(_named(name, item) for name in part)} for item in items]
        return all(found) and set().union(*found) == set(range(len(parts)))
    if question.parts:
        padded = f" {given} "
        return all(any(_named(normalize(name), padded) for name in part) for part in question.parts)
    return given in {normalize(right) for right in (question.answer, *question.accepted)}


def _named(name: str, padded: str) -> bool:
    return any(f" {form} " in padded for form in (name, f"{name}s", f"{name}es"))


class Count(TypedDict):
    """How `Asker.ask` is told that a number is the answer."""

    answer: str
    also: tuple[str, ...]


def count(n: int) -> Count:
    """The answer of a count, and what is as right."""
    return {"answer": NUMBERS[n], "also": (str(n), "none", "no") if n == 0 else (str(n),)}


def at(place: str) -> str:
    """A place as a sentence says it: "at the top left"."""
    return PLACES[place]
