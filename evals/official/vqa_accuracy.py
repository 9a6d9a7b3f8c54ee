"""VQA accuracy and its answer normalisation (Antol et al. 2015; the evaluation code of VQA, and TextVQA's of it, are the rules)."""

from __future__ import annotations

import re
from collections.abc import Sequence

# By how apostrophes go missing in answers: a word without one of its apostrophes means the word.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word for word in _CONTRACTED for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # fmt: skip
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = ("a", "an", "the")
_MARKS = ";/[]\"{}()=+\\_-><@`,?!"
_COMMA_IN_NUMBER = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")


def normalise(text: str) -> str:
    """As the VQA evaluation server does: marks go or become blanks, numbers become digits, articles go, apostrophes come back."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [NUMBERS.get(word, word) for word in _without_marks(text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_marks(text: str) -> str:
    """A mark beside a blank goes, and so do all if a number holds a comma; else it becomes a blank."""
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _MARKS:
        out = out.replace(mark, "" if in_number or f"{mark} " in text or f" {mark}" in text else " ")
    return _PERIOD.sub("", out, count=32)  # their code passes re.UNICODE, 32, where the count stands


def prepare(text: str) -> str:
    """As TextVQA's evaluation does, and as LLaVA does before it hands answers to a server: lower case, no commas and question
    marks, a blank before 's, then `normalise`."""
    return normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def agreement(given: str, answers: Sequence[str]) -> float:
    """Mean over leaving one person out of min(1, how many of the others gave it / 3)."""
    n, same = len(answers), sum(answer == given for answer in answers)
    return (same * min(1.0, (same - 1) / 3) + (n - same) * min(1.0, same / 3)) / n


def vqa_accuracy(given: str, answers: Sequence[str]) -> float:
    """The VQA server's: where all people agree to the letter, nothing is normalised."""
    answers = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    given = given.replace("\n", " ").replace("\t", " ").strip()
    if len(set(answers)) > 1:
        answers, given = [normalise(answer) for answer in answers], normalise(given)
    return agreement(given, answers)
