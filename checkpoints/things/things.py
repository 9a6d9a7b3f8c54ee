"""Scenes of things: one, large; or several, with where they stand and how they compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from random import Random

from PIL import Image

from checkpoints.things import catalogue, drawings, paint
from checkpoints.things.catalogue import Thing, article
from checkpoints.things.scene import NUMBERS, PLACES, Asker, Mark, Scene, at, count

FACTS = ("eat", "drink", "fly", "water", "wheels", "alive", "wear", "farm")
_ALIKE = (frozenset({"top", "top center", "top middle"}), frozenset({"bottom", "bottom center", "bottom middle"}),
          frozenset({"left", "center left", "middle left"}), frozenset({"right", "center right", "middle right"}),
          frozenset({"center", "middle"}))  # fmt: skip
ASKED_KINDS = ("animal", "bird", "fruit", "food", "vegetable", "drink", "plant", "vehicle", "building", "tool")
GRAY = 0.2
"""How many of the gray drawings are asked their color: changed drawings are gray more often than things are."""
MOST = 6
"""Things in a scene, at most."""


@cache
def drawable(hands: tuple[str, ...]) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Each thing that some of the hands have drawn, with its drawings: (hand, icon)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for hand in hands:
        for name, icon in drawings.every(hand):
            found.setdefault(name, []).append((hand, icon))
    return tuple((name, tuple(pairs)) for name, pairs in found.items())


def _pick(rng: Random, hands: tuple[str, ...], name: str) -> tuple[str, Image.Image]:
    """A drawing of a thing: a hand is chosen first, so that a hand with many drawings of it is not seen more."""
    pairs = dict(drawable(hands))[name]
    hand = rng.choice(sorted({hand for hand, _ in pairs}))
    return hand, drawings.drawing(hand, rng.choice([icon for by, icon in pairs if by == hand]))


def _put(
    rng: Random, canvas: Image.Image, thing: Thing, hands: tuple[str, ...], spot: tuple[float, float, float], strong: bool
) -> tuple[Mark, str | None]:
    """Draw a thing on the canvas, as near to its spot as there is room; its mark, and the name of its color if it has one.

    A spot is x and y of the center and the longest side, as shares of the canvas's side.
    """
    side = canvas.width
    x, y, longest = spot
    hand, image = _pick(rng, hands, thing.name)
    image = paint.shrink(image, longest * side)
    image = paint.fit(rng, paint.vary(rng, image) if strong else image, longest * side, strong=strong)
    left = round(min(max(x * side - image.width / 2, 0), side - image.width))
    top = round(min(max(y * side - image.height / 2, 0), side - image.height))
    paint.place(rng, canvas, image, left, top)
    box = left / side, top / side, (left + image.width) / side, (top + image.height) / side
    return Mark(box, thing.name, thing.kind.name, hand), paint.color_name(image)


def draw_one(rng: Random, hands: tuple[str, ...], side: int, paraphrase: str, strong: bool) -> Scene:
    thing = catalogue.load()[rng.choice(drawable(hands))[0]]
    canvas, ground = paint.ground(rng, side)
    longest = rng.uniform(0.3, 0.98) if strong else rng.uniform(0.45, 0.95)
    slack = (1 - longest) / 2
    spot = 0.5 + rng.uniform(-slack, slack), 0.5 + rng.uniform(-slack, slack), longest
    mark, color = _put(rng, canvas, thing, hands, spot, strong)
    asker = Asker(rng, paraphrase)
    ask_one(asker, thing, color, ground)
    return Scene("one", paint.shoot(rng, canvas, strong=strong), [mark], asker.questions)


def _kinds(thing: Thing) -> tuple[str, ...]:
    """Names of a thing's kind, the narrowest first."""
    kind = thing.kind
    wider = (kind.wider,) if kind.wider else ()
    return tuple(dict.fromkeys([kind.name, *wider, *kind.also, kind.one, kind.many]))


KIND_WORDS = {"animal": "animal", "bird": "bird", "insect": "insect", "sea animal": "sea animal", "fruit": "fruit",
              "vegetable": "vegetable", "food": "food", "drink": "drink", "plant": "plant", "vehicle": "vehicle",
              "building": "building", "clothing": "piece of clothing", "musical instrument": "musical instrument", "tool": "tool",
              "device": "device", "face": "face", "symbol": "symbol", "body part": "body part", "toy": "toy",
              "furniture": "piece of furniture"}  # fmt: skip
"""Kinds that people ask by: "what fruit is this?"."""


def ask_one(asker: Asker, thing: Thing, color: str | None, ground: str | None) -> None:
    """What people ask of a picture of one thing; nothing about colors that are None."""
    ask, rng = asker.ask, asker.rng
    things = catalogue.load()
    also = (*thing.also, thing.one)
    told = f"It is {thing.one}."
    ask("what", thing.name, also=also, sentence=told)
    if words := [KIND_WORDS[k] for k in (thing.kind.name, thing.kind.wider) if k in KIND_WORDS]:
        ask("what_kind_name", thing.name, also=also, sentence=told, kind=rng.choice(words))
    kind, *wider = _kinds(thing)
    ask("kind", kind, also=wider, sentence=f"It is {thing.kind.one}.")
    rest = [t for t in things.values() if t.name not in catalogue.confusable(thing.name)]
    same = [t for t in rest if t.kind is thing.kind]
    other = rng.choice(same if same and rng.random() < 0.5 else rest)
    yes = rng.random() < 0.5
    shown = thing if yes else other
    ask("is_it", "yes" if yes else "no", sentence=f"{'Yes' if yes else 'No'}, it is {thing.one}.", one=shown.one)
    one, two = rng.sample([thing.one, other.one], 2)
    ask("either", thing.name, also=also, one=one, other=two)
    yes = rng.random() < 0.5
    shown = thing if yes else rng.choice(rest)
    ask("exists", "yes" if yes else "no", one=shown.one, many=shown.many)
    for fact in _facts_to_ask(rng, thing):
        ask(fact, "yes" if fact in thing.facts else "no")
    if color and (color != "gray" or rng.random() < GRAY):
        ask("color", color, also=paint.ALSO.get(color, ()), sentence=f"{thing.the.capitalize()} is {color}.", the=thing.the)
    if ground:
        ask("ground", ground, also=paint.ALSO.get(ground, ()))
    ask("describe", f"The picture shows {thing.one}.", parts=[thing.names])


def _facts_to_ask(rng: Random, thing: Thing) -> list[str]:
    """One fact that is true of the thing, if any, and one that is not."""
    askable = [f for f in FACTS if f not in ("farm", "water") or thing.is_a("animal")]
    if thing.kind.name in ("symbol", "face", "body part", "weather", "nature"):
        askable = ["eat", "wheels", "wear"]
    true = [f for f in askable if f in thing.facts]
    false = [f for f in askable if f not in thing.facts and not (f == "eat" and thing.is_a("animal"))]
    if "grows" in thing.facts or thing.kind.name == "plant":
        false = [f for f in false if f not in ("alive", "eat")]
    # What is seldom true is seldom asked of other things, or "no" would always be a good guess.
    asked = rng.choices(false, [_shares()[f] for f in false]) if false else []
    return [*asked, *([rng.choice(true)] if true else [])]


@cache
def _shares() -> dict[str, int]:
    return {fact: sum(fact in thing.facts for thing in catalogue.load().values()) for fact in FACTS}


def draw_several(rng: Random, hands: tuple[str, ...], side: int, paraphrase: str, strong: bool) -> Scene:
    things = catalogue.load()
    known = [name for name, _ in drawable(hands)]
    n = rng.choices(range(1, MOST + 1), (1, 4, 4, 4, 3, 2))[0]
    shown: list[Thing] = []
    while len(shown) < n:
        if shown and rng.random() < 0.35:
            shown.append(rng.choice(shown))
            continue
        thing = things[rng.choice(known)]
        if not any(t is not thing and t.name in catalogue.confusable(thing.name) for t in shown):
            shown.append(thing)
    canvas, ground = paint.ground(rng, side)
    largest = {1: 0.9, 2: 0.5, 3: 0.45, 4: 0.42, 5: 0.38, 6: 0.35}[n]
    spots = layout(rng, n, lambda: rng.uniform(0.17, largest))
    put = [_put(rng, canvas, thing, hands, spot, strong) for thing, spot in zip(shown, spots, strict=True)]
    put.sort(key=lambda pair: (round(pair[0].center[1] * 3 - 0.5), pair[0].center[0]))  # as one reads
    marks = [mark for mark, _ in put]
    asker = Asker(rng, paraphrase)
    _ask_several(asker, marks, {mark.name: color for mark, color in put if color}, ground)
    return Scene("several", paint.shoot(rng, canvas, strong=strong), marks, asker.questions)


def layout(rng: Random, n: int, longest_side: Callable[[], float]) -> list[tuple[float, float, float]]:
    """Centers and longest sides, as shares of the picture's, of n things that do not overlap."""
    scale = 1.0
    while True:
        spots: list[tuple[float, float, float]] = []
        for _ in range(60):
            longest = scale * longest_side()
            x, y = (rng.uniform(longest / 2, 1 - longest / 2) for _ in range(2))
            if all(max(abs(x - u), abs(y - v)) > (longest + other) / 2 + 0.01 for u, v, other in spots):
                spots.append((x, y, longest))
                if len(spots) == n:
                    return spots
        scale *= 0.93


def places(center: tuple[float, float]) -> tuple[str, ...]:
    """Names of the ninth of the picture that a point is in; of its neighbours too, if it is near them."""

    def cells(v: float) -> list[int]:
        cell = min(2, int(v * 3))
        return sorted({cell, min(2, int((v + 0.05) * 3)), max(0, int((v - 0.05) * 3))}, key=lambda c: c != cell)

    found = [tuple(PLACES)[row * 3 + column] for row in cells(center[1]) for column in cells(center[0])]
    return tuple(dict.fromkeys([*found, *(name for names in _ALIKE for name in sorted(names) if found[0] in names)]))


def spoken_place(where: Sequence[str]) -> list[str]:
    """The places, and how they are said in a sentence."""
    return [*where, *(at(place) for place in where if place in PLACES)]


def _ask_several(asker: Asker, marks: Sequence[Mark], colors: Mapping[str, str], ground: str | None) -> None:
    ask, rng = asker.ask, asker.rng
    things = catalogue.load()
    shown = [things[m.name] for m in marks]
    counts = Counter(m.name for m in marks)
    lone = [m for m in marks if counts[m.name] == 1]
    taken = frozenset[str]().union(*(catalogue.confusable(t.name) for t in shown))
    absent = [t for t in things.values() if t.name not in taken]
    near = [t for t in absent if any(t.kind is s.kind for s in shown)] or absent

    yes = rng.random() < 0.5
    thing = rng.choice(shown) if yes else rng.choice(near if rng.random() < 0.5 else absent)
    n = counts[thing.name]
    there = f"there are {NUMBERS[n]} {thing.many}" if n > 1 else f"there is {thing.one}"
    ask("exists", "yes" if yes else "no", sentence=f"Yes, {there}." if yes else f"No, there is no {thing.name}.",
        one=thing.one, many=thing.many)  # fmt: skip
    thing = rng.choice(shown) if rng.random() < 0.85 else rng.choice(near)
    ask("count", **count(counts[thing.name]), many=thing.many)
    ask("count_all", **count(len(marks)),
        sentence=f"There {'is one thing' if len(marks) == 1 else f'are {NUMBERS[len(marks)]} things'} in the picture.")  # fmt: skip
    if lone:
        m = rng.choice(lone)
        where = places(m.center)
        ask("where", where[0], also=spoken_place(where), sentence=f"{_the(m).capitalize()} is {at(where[0])}.", the=_the(m))
        thing = things[m.name]
        kind, *wider = _kinds(thing)
        ask("kind_of", kind, also=wider, the=thing.the)
    _ask_places(asker, marks)
    ask_pairs(asker, lone)
    if len(marks) > 1:
        first, second = sorted(marks, key=lambda m: -m.area)[:2]
        if first.area > 1.4 * second.area:
            ask("largest", first.name, also=_also(first))
    kinds = Counter(k for s in {s.name: s for s in shown}.values() for k in (s.kind.name, s.kind.wider) if k)
    single = [m for m in lone for k in (m.kind, things[m.name].kind.wider) if k in KIND_WORDS and kinds[k] == 1]
    if single:
        m = rng.choice(single)
        kind = rng.choice([k for k in (m.kind, things[m.name].kind.wider) if k in KIND_WORDS and kinds[k] == 1])
        ask("which_kind", m.name, also=_also(m), kind=KIND_WORDS[kind])
    yes = rng.random() < 0.5
    pool = [k for k in ASKED_KINDS if bool(kinds[k]) is yes]
    if pool and not (not yes and any("grows" in s.facts for s in shown)):
        one, many = _kind_words(rng.choice(pool))
        ask("any_kind", "yes" if yes else "no", one=one, many=many)
    names = [f"{NUMBERS[c]} {things[t].many}" if c > 1 else things[t].one for t, c in counts.items()]
    ask("list", ", ".join(f"{NUMBERS[c]} {things[t].many}" if c > 1 else t for t, c in counts.items()),
        parts=[(*things[t].names, things[t].many) for t in counts])  # fmt: skip
    if len(marks) <= 2:
        text = f"The picture shows {join(names)}."
    else:
        placed = [f"{things[m.name].one} {at(places(m.center)[0])}" for m in marks]
        text = f"The picture shows {NUMBERS[len(marks)]} things: {join(placed)}."
    ask("describe", text, parts=[(*things[t].names, things[t].many) for t in counts])
    if colored := [m.name for m in lone if m.name in colors and (colors[m.name] != "gray" or rng.random() < GRAY)]:
        name = rng.choice(colored)
        ask("color", colors[name], also=paint.ALSO.get(colors[name], ()), the=things[name].the)
    if ground:
        ask("ground", ground, also=paint.ALSO.get(ground, ()))


def _kind_words(kind: str) -> tuple[str, str]:
    if kind == "food":
        return "something to eat", "things to eat"
    table = next(t.kind for t in catalogue.load().values() if t.kind.name == kind)
    return table.one, table.many


def join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _the(mark: Mark) -> str:
    thing = catalogue.load().get(mark.name)
    return thing.the if thing else f"the {mark.name}"


def _also(mark: Mark) -> tuple[str, ...]:
    thing = catalogue.load().get(mark.name)
    return (*thing.also, thing.one) if thing else (article(mark.name),)


def _ask_places(asker: Asker, marks: Sequence[Mark]) -> None:
    """What stands at a place, where one thing clearly does."""
    clear = [(m, found[0]) for m in marks if len(found := [p for p in PLACES if p in places(m.center)[:4]]) == 1]
    near = Counter(place for m in marks for place in set(places(m.center)[:4]) & PLACES.keys())
    if clear := [(m, place) for m, place in clear if near[place] == 1]:
        m, place = asker.rng.choice(clear)
        asker.ask("at", m.name, also=_also(m), place=at(place))


def ask_pairs(asker: Asker, lone: Sequence[Mark]) -> None:
    """How two things stand to each other, where it is clear; both are alone of their name."""
    ask, rng = asker.ask, asker.rng
    pairs = [(a, b) for a in lone for b in lone if a is not b]
    if not pairs:
        return
    axes = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}

    def apart(a: Mark, b: Mark, side: str) -> float:
        axis, sign = axes[side]
        return sign * (a.center[axis] - b.center[axis])

    alone = [(a, b, side) for a, b in pairs for side in axes
             if apart(a, b, side) > 0.12 and all(apart(c, b, side) < 0.02 for c in lone if c not in (a, b))]  # fmt: skip
    if alone:
        a, b, side = rng.choice(alone)
        spoken = rng.choice((side, side.replace("to the ", ""))) if "to the" in side else side
        ask("beside", a.name, also=_also(a), sentence=f"{_the(a).capitalize()} is {side} {_the(b)}.", side=spoken, the=_the(b))
    clear = [(a, b, side) for a, b in pairs for side in axes if apart(a, b, side) > 0.12]
    if clear:
        a, b, side = rng.choice(clear)
        yes = rng.random() < 0.5
        one, other = (a, b) if yes else (b, a)
        ask("side_yes", "yes" if yes else "no", the=_the(one), side=side, other=_the(other))
    for type_, axis, names in (("left_right", 0, ("left", "right")), ("above_below", 1, ("above", "below"))):
        if across := [(a, b) for a, b in pairs if abs(a.center[axis] - b.center[axis]) > 0.12]:
            a, b = rng.choice(across)
            found = names[a.center[axis] > b.center[axis]]
            long = {"left": "to the left of", "right": "to the right of"}.get(found, found)
            also = {"left": ("to the left", "on the left"), "right": ("to the right", "on the right"),
                    "above": ("higher", "over"), "below": ("lower", "under")}[found]  # fmt: skip
            ask(type_, found, also=also, sentence=f"{_the(a).capitalize()} is {long} {_the(b)}.", the=_the(a), other=_the(b))
    if uneven := [(a, b) for a, b in pairs if a.area > 1.5 * b.area]:
        a, b = rng.choice(uneven)
        one, other = rng.sample([a, b], 2)
        ask(
            "larger",
            a.name,
            also=_also(a),
            sentence=f"{_the(a).capitalize()} is larger than {_the(b)}.",
            the=_the(one),
            other=_the(other),
        )
        if rng.random() < 0.5:
            ask("smaller", b.name, also=_also(b), the=_the(one), other=_the(other))
