"""The things that the drawings show: names, synonyms, kinds and what is true of them, from `things.toml`."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VOWELS = "aeiou"
AN = (*"aeio", "um", "up", "hour")
"""How nouns begin that take "an"; other words in u begin as "you" does."""


IRREGULAR = {
    "mouse": "mice", "goose": "geese", "sheep": "sheep", "deer": "deer", "fish": "fish", "ox": "oxen", "tooth": "teeth",
    "foot": "feet", "knife": "knives", "leaf": "leaves", "loaf": "loaves", "wolf": "wolves", "man": "men", "woman": "women",
    "person": "people", "bison": "bison", "moose": "moose", "squid": "squid", "shrimp": "shrimp", "scarf": "scarves",
    "dice": "dice", "snowman": "snowmen",
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What sort of thing something is; `also` are other words for it, `wider` is the kind that it is part of, if any."""

    name: str
    also: tuple[str, ...]
    one: str
    many: str
    wider: str | None


@dataclass(frozen=True)
class Thing:
    """`name` is what people say, without an article; `also` are other names that are as right; `icons` are the names of its
    drawings, as `plain_name` gives them; `facts` is what is true of it."""

    name: str
    also: tuple[str, ...]
    kind: Kind
    one: str
    many: str
    icons: frozenset[str]
    facts: frozenset[str]

    @property
    def the(self) -> str:
        """The thing with "the", in words that take a verb in the singular: "the pair of glasses", "the dog"."""
        head, _, rest = self.one.partition(" ")
        return f"the {rest}" if head in ("a", "an", "some") else f"the {self.one}"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.also)

    def is_a(self, kind: str) -> bool:
        """Whether it is of the kind, or of a kind that is part of it."""
        return kind in (self.kind.name, self.kind.wider)


def article(noun: str) -> str:
    return f"{'an' if noun.startswith(AN) else 'a'} {noun}"


def plural(noun: str) -> str:
    """The plural of a regular English noun, and of the few irregular ones among the things."""
    head, _, last = noun.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")) or last in ("potato", "tomato", "mango", "mosquito", "volcano", "tornado"):
        last += "es"
    elif last.endswith("y") and last[-2] not in VOWELS:
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()


def _listed(row: dict) -> tuple[str, ...]:
    return tuple(filter(None, row.get("also", "").split(", ")))


@cache
def confusable(name: str) -> frozenset[str]:
    """The things that a drawing of this one may rightly be called, itself among them."""
    things = load()
    return frozenset(other for other, thing in things.items() if {*thing.names} & {*things[name].names})


@cache
def digest() -> str:
    """A digest of the names of all drawings in the catalogue."""
    names = sorted({icon for thing in load().values() for icon in thing.icons})
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


@cache
def load() -> dict[str, Thing]:
    """Every thing by its name, in the order of the file."""
    tables = tomllib.loads(Path(__file__).with_name("things.toml").read_text("utf-8"))
    kinds = {name: Kind(name, _listed(t), t["one"], t["many"], t.get("part_of")) for name, t in tables.items()}
    things = {}
    for kind_name, table in tables.items():
        for name, row in table["things"].items():
            icons = row.get("icons", name.replace(" ", "-")).split()
            facts = frozenset(table.get("is", "").split()) | frozenset(row.get("is", "").split())
            things[name] = Thing(
                name,
                _listed(row),
                kinds[kind_name],
                row.get("one", article(name)),
                row.get("many", plural(name)),
                frozenset(icon.replace("-", "") for icon in icons),
                facts - frozenset(row.get("no", "").split()),
            )
    return things
