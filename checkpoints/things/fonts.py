"""Typefaces of signs and charts: fetched from npm with their licences, kept in the user's cache."""

from __future__ import annotations

import os
import tarfile
from functools import cache, lru_cache
from random import Random

from PIL import ImageFont

from checkpoints.things.drawings import Package, fetch, things_folder, use_samples

_PACKAGES = {
    "alfa-slab-one": "9a23f35cd084f78793d3375618def5b8a56251df4191edce109a7738b54148b0",
    "archivo-narrow": "7adbb6ba7514b065ae523907c88b1ab37dc69c002bf3602ab3c8b31d66be8c33",
    "bebas-neue": "57928e0ee30b9e8a99033cdd5dc74ad06761007b4ad8fc32173e5d9072ba91fa",
    "caveat": "ebf746fc0667b9d10fcac7c8604e2ba40a264da85a1c9b48bd679c0af3221293",
    "comic-neue": "0d242660fa8a3e31deb4ba0005b830904db4533ae3366f9c41724ff452662fa6",
    "courier-prime": "fd204a077d81426e1425baed6d471ad78a8eccca931091e661637bb10b5f2724",
    "crimson-text": "9ca1f89ed823a36d15fdb8d4883798955cd43b4ead4a15b305e76cf8429f0ca4",
    "inconsolata": "d34e446cb20ca819c3bc2795ff7dd1f071a4a7a6f8a38518af3b47144b5e06d9",
    "lora": "3f2e66b0934b8652bb1a37645a9fc3e77e83b5841a09e97174e7bb11e11063c9",
    "merriweather": "348f20a775e50a50b508ab6660771df6905ab2ea695c6c2a8df889c5cceec42f",
    "montserrat": "919dce59bbe45ace8a517c1e9de5076282bfeb97e8aa8f5f2dc989451c14c7cb",
    "nunito": "4d8e1fb4f4a40c125c7a302b21e5c6810b86569b60bac0fa0405c04380f4c77b",
    "oswald": "27bf46420288bb65bd186638cde54686aa8f9d5dc975b1d597dfe81a7dd472cb",
    "patrick-hand": "c3428d02610c7b8fa92b044cf766f8c30b88bb32a47460b4ac42fa14e0bcdcc0",
    "permanent-marker": "1fc372d174353a87b0ae7bb9651e32e7d1731f9e0b4c50c5d8704baea032bc1b",
    "playfair-display": "564e61951ecc3e962793cd50395f718cda6350cb934f9000dbe0139c768dc023",
    "roboto": "77620f437249772e381698224ea1bddd01c985ecd60267a63ddc96b9eb9348f7",
    "ubuntu": "d69a09b1f2dcf4e470da62fd9c767175d957eb77d1e56767c94357abd3d48287",
}
PACKAGES = {name: Package(f"@fontsource/{name}", "5.3.0", sha256) for name, sha256 in _PACKAGES.items()}
UNSEEN = ("archivo-narrow", "crimson-text", "permanent-marker", "ubuntu")
"""Typefaces of the validation and test splits; all others, and Pillow's own, are those of training."""
_ONE_WEIGHT = ("alfa-slab-one", "bebas-neue", "patrick-hand", "permanent-marker")


@cache
def _file(name: str, weight: int) -> str:
    path = things_folder() / "fonts" / f"{name}-{weight}.woff2"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fetch(PACKAGES[name])) as archive:
            file = archive.extractfile(f"package/files/{name}-latin-{weight}-normal.woff2")
            assert file is not None, name
            partial = path.with_suffix(f".{os.getpid()}.part")
            partial.write_bytes(file.read())
            partial.replace(path)
    return str(path)


@lru_cache(512)
def _font(name: str, weight: int, size: int) -> ImageFont.FreeTypeFont:
    if name == "pillow":
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return font
    return ImageFont.truetype(_file(name, weight), size)


def pick(rng: Random, *, unseen: bool) -> tuple[str, int]:
    """A typeface and its weight."""
    names = UNSEEN if unseen else ("pillow", *(name for name in PACKAGES if name not in UNSEEN))
    name = rng.choice(names)
    weight = rng.choice((400, 700))
    if use_samples():
        return "pillow", 400
    return name, 400 if name in _ONE_WEIGHT else weight


def at_size(face: tuple[str, int], size: float) -> ImageFont.FreeTypeFont:
    """A typeface at a size in pixels; every second one up to 40, every fourth above, so that few are kept."""
    step = 2 if size < 40 else 4
    return _font(*face, max(8, round(size / step) * step))


def to_width(face: tuple[str, int], text: str, width: float, tallest: float) -> ImageFont.FreeTypeFont:
    """A typeface at the largest size that keeps a line within a width and a size."""
    reach = _font(*face, 40).getlength(text)
    return at_size(face, min(tallest, 40 * width / max(reach, 1) * 0.98))
