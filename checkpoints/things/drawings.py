"""The drawings of each hand: fetched from npm, rendered once, kept in the user's cache.

A *hand* is a designer's set of drawings. Each is an npm package of SVG by name; a rendered hand is one zip of PNGs.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from multiprocessing import get_context
from pathlib import Path

from PIL import Image
from rich.progress import track

from checkpoints.cache import cache_folder
from checkpoints.things import catalogue

SIZE = 256
"""Longer side of a rendered drawing, in pixels."""
SAMPLES = Path(__file__).with_name("samples")
"""A few drawings of every hand, enough for tests: one JSON file a hand, in the form of the packages' own `icons.json`."""


class DrawingsError(RuntimeError):
    """The drawings cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Package:
    """A pinned npm package; `sha256` is that of the archive that `npm pack` writes."""

    name: str
    version: str
    sha256: str

    @property
    def archive(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    "noto": Package("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": Package("@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "twemoji": Package("@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "fluent-emoji": Package(
        "@iconify-json/fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"
    ),
    "fluent-emoji-flat": Package(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
    "fluent-emoji-high-contrast": Package(
        "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0"
    ),
    "emojione": Package("@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "streamline-emojis": Package(
        "@iconify-json/streamline-emojis", "1.2.4", "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"
    ),
    "fxemoji": Package("@iconify-json/fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "openmoji": Package("@iconify-json/openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
}

MISNAMED = {"streamline-emojis": {"turkey"}, "fxemoji": {"keyboard", "sunglasses", "window", "gamedie"}}
"""Drawings that show something else than their name says elsewhere: a flag, a piano, a face."""


def things_folder() -> Path:
    """Where fetched and rendered files are kept, in the user's cache."""
    return cache_folder() / "things"


def fetch(package: Package) -> Path:
    """The package's archive, fetched with npm unless it is there. Raises DrawingsError without npm or for another hash."""
    path = things_folder() / "npm" / package.archive
    if not path.exists():
        if not (npm := shutil.which("npm")):
            raise DrawingsError(f"{package.name} is fetched with npm, which is not installed; install Node.js, then try again")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [npm, "pack", "--silent", "--pack-destination", folder, f"{package.name}@{package.version}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr or done.stdout).strip().splitlines() or ["it says no reason"]
                raise DrawingsError(f"npm cannot fetch {package.name}@{package.version}: {reason[0]}")
            (Path(folder) / package.archive).replace(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
        raise DrawingsError(f"{path} is not the {package.name} {package.version} that is expected; delete it and try again")
    return path


def read_member(package: Package, member: str) -> bytes:
    """One file of a fetched package."""
    with tarfile.open(fetch(package)) as archive:
        file = archive.extractfile(f"package/{member}")
        assert file is not None, member
        return file.read()


def plain_name(icon: str) -> str:
    """An icon's name as the catalogue has it: `dog-face-2` and `dogface` are both `dogface`."""
    return re.sub(r"(?<=[a-z])-\d+$", "", icon).replace("-", "")


def svgs(hand: str, icons: dict) -> dict[str, str]:
    """The SVG of every icon of an `icons.json` that the catalogue names, by the icon's name."""
    wanted = frozenset[str]().union(*(thing.icons for thing in catalogue.load().values()))
    found = {}
    for name, icon in icons["icons"].items():
        if plain_name(name) in wanted and name not in MISNAMED.get(hand, ()):
            width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
            found[name] = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
            )
    return found


def render(svg: str) -> Image.Image:
    """An SVG as RGBA, cut to what is drawn; its longer side is SIZE pixels or a little less.

    Raises DrawingsError without resvg-py.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise DrawingsError("drawings are rendered with the package resvg-py; pip install resvg-py") from error
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    return image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())


def _png(item: tuple[str, str]) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    render(item[1]).save(buffer, "PNG")
    return item[0], buffer.getvalue()


def _rendered(svgs: list[tuple[str, str]]) -> Iterator[tuple[str, bytes]]:
    if len(svgs) < 50:  # not worth other processes
        yield from map(_png, svgs)
    else:
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            yield from pool.map(_png, svgs, chunksize=16)


def build(hand: str) -> Path:
    """The zip of a hand's rendered drawings; what the catalogue names and it lacks is rendered first."""
    path = things_folder() / f"{hand}.zip"
    stamp = path.with_suffix(".stamp")
    key = catalogue.digest()
    if path.exists() and stamp.exists() and stamp.read_text() == key:
        return path
    partial = path.with_suffix(f".{os.getpid()}.part")
    found = svgs(hand, json.loads(read_member(PACKAGES[hand], "icons.json")))
    if path.exists():
        shutil.copyfile(path, partial)
    with zipfile.ZipFile(partial, "a", zipfile.ZIP_STORED) as archive:
        have = set(archive.namelist())
        missing = [item for item in found.items() if f"{item[0]}.png" not in have]
        for name, png in track(_rendered(missing), f"rendering {hand}", total=len(missing), disable=not missing):
            archive.writestr(f"{name}.png", png)
    partial.replace(path)
    stamp.write_text(key)
    return path


@cache
def _archive(hand: str, pid: int) -> zipfile.ZipFile:  # a forked worker may not share a file's position with its parent
    return zipfile.ZipFile(build(hand))


@cache
def names(hand: str) -> dict[str, tuple[str, ...]]:
    """The names of a hand's drawings by thing; things that it has not drawn are left out."""
    if use_samples():
        icons = [*json.loads((SAMPLES / f"{hand}.json").read_text("utf-8"))["icons"]]
    else:
        icons = [name.removesuffix(".png") for name in _archive(hand, os.getpid()).namelist()]
    icons = [icon for icon in icons if icon not in MISNAMED.get(hand, ())]
    by_icon: dict[str, list[str]] = {}
    for icon in icons:
        by_icon.setdefault(plain_name(icon), []).append(icon)
    drawn = {}
    for thing in catalogue.load().values():
        if found := [icon for plain in sorted(thing.icons) for icon in by_icon.get(plain, ())]:
            drawn[thing.name] = tuple(found)
    return drawn


def use_samples() -> bool:
    """Whether the committed samples stand in for the fetched sets: ESPALIER_THINGS=samples, for tests without a network."""
    return os.environ.get("ESPALIER_THINGS") == "samples"


@lru_cache(2048)
def drawing(hand: str, icon: str) -> Image.Image:
    """A drawing as RGBA, cut to what is drawn."""
    if use_samples():
        return render(svgs(hand, json.loads((SAMPLES / f"{hand}.json").read_text("utf-8")))[icon])
    image = Image.open(io.BytesIO(_archive(hand, os.getpid()).read(f"{icon}.png")))
    image.load()
    return image


def write_subset(hand: str, path: Path, things: Iterable[str]) -> int:
    """Write the drawings that a hand has of some things as one JSON file in the form of the package's own, with its author and
    licence, and return its size in bytes. What tests and an evaluation without a network need is kept so."""
    icons = json.loads(read_member(PACKAGES[hand], "icons.json"))
    info = json.loads(read_member(PACKAGES[hand], "info.json"))
    wanted = [icon for thing in things for icon in names(hand).get(thing, ())]
    kept = {
        "prefix": icons["prefix"],
        "info": {"name": info["name"], "author": info["author"], "license": info["license"]},
        "icons": {icon: icons["icons"][icon] for icon in wanted},
        **{side: icons[side] for side in ("width", "height", "left", "top") if side in icons},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.write_text(json.dumps(kept, indent=0) + "\n", "utf-8")


def every(hand: str) -> Iterator[tuple[str, str]]:
    """Each thing that a hand has drawn, with each of its drawings: (thing, icon)."""
    for thing, icons in names(hand).items():
        yield from ((thing, icon) for icon in icons)
