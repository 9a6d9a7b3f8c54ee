"""Grounds to stand on, what is done to a drawing before it is placed, and what a camera does to the whole."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from math import cos, pi, radians, sin, sqrt
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

Rgb = tuple[int, int, int]

COLORS = {
    "red": (214, 40, 40),
    "green": (38, 150, 60),
    "blue": (40, 80, 215),
    "yellow": (242, 214, 40),
    "purple": (140, 50, 170),
    "orange": (245, 135, 25),
    "pink": (245, 150, 190),
    "brown": (125, 75, 40),
    "teal": (10, 135, 135),
    "gray": (128, 128, 128),
    "white": (248, 248, 248),
    "black": (16, 16, 16),
}
ALSO = {"gray": ("grey",), "teal": ("turquoise", "cyan"), "purple": ("violet",)}
"""Other names of a color that are as right."""


def jitter(rng: Random, color: Rgb, amount: int) -> Rgb:
    return tuple(max(0, min(255, c + rng.randint(-amount, amount))) for c in color)  # type: ignore[return-value]


def any_color(rng: Random) -> Rgb:
    """Mostly muted and light, as grounds are; sometimes anything."""
    if rng.random() < 0.25:
        return (rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))
    base = rng.randint(60, 250) if rng.random() < 0.75 else rng.randint(0, 90)
    return jitter(rng, (base, base, base), rng.choice((0, 8, 25, 45)))


@cache
def _noise(seed: int, octave: int) -> Image.Image:
    """A 1024-pixel tile of gray noise, coarser with the octave; made once."""
    side = max(4, 1024 >> octave)
    tile = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    return Image.fromarray(tile).resize((1024, 1024), Image.Resampling.BICUBIC)


def noise(rng: Random, size: tuple[int, int], octave: int) -> Image.Image:
    """A piece of a noise tile, "L"."""
    left, top = rng.randint(0, 1024 - size[0]), rng.randint(0, 1024 - size[1])
    piece = _noise(rng.randint(0, 3), octave).crop((left, top, left + size[0], top + size[1]))
    return piece.transpose(Image.Transpose(rng.randint(0, 5))) if size[0] == size[1] else piece


def _pixels(rng: Random, width: int, height: int, spread: int, side: int) -> Image.Image:
    base = any_color(rng)
    image = Image.new("RGB", (width, height))
    image.putdata([jitter(rng, base, spread) for _ in range(width * height)])
    return image.resize((side, side), Image.Resampling.BICUBIC)


def _gradient(rng: Random, side: int) -> Image.Image:
    ramp = Image.linear_gradient("L") if rng.random() < 0.7 else Image.radial_gradient("L")
    mask = ramp.rotate(rng.uniform(0, 360), expand=False).crop((40, 40, 216, 216)).resize((side, side), Image.Resampling.BILINEAR)
    return Image.composite(Image.new("RGB", (side, side), any_color(rng)), Image.new("RGB", (side, side), any_color(rng)), mask)


def _blobs(rng: Random, side: int) -> Image.Image:
    n = rng.randint(2, 7)
    return _pixels(rng, n, n, rng.choice((20, 60, 120)), side)


def _texture(rng: Random, side: int) -> Image.Image:
    octave = rng.randint(0, 7)
    mask = noise(rng, (side, side), octave)
    if rng.random() < 0.6:
        mask = Image.blend(mask, noise(rng, (side, side), max(0, octave - rng.randint(1, 3))), rng.uniform(0.2, 0.6))
    if rng.random() < 0.3:  # wood, cloth: the same grain drawn out along one way
        strip = mask.crop((0, 0, side, max(4, side // rng.randint(8, 40)))).resize((side, side), Image.Resampling.BICUBIC)
        mask = strip.transpose(Image.Transpose.ROTATE_90) if rng.random() < 0.5 else strip
    a = any_color(rng)
    b = jitter(rng, a, rng.choice((20, 40, 80)))
    return Image.composite(Image.new("RGB", (side, side), a), Image.new("RGB", (side, side), b), mask)


def _stripes(rng: Random, side: int) -> Image.Image:
    a = any_color(rng)
    b = jitter(rng, a, rng.choice((15, 30, 60)))
    image = Image.new("RGB", (side, side), a)
    draw = ImageDraw.Draw(image)
    pitch = rng.uniform(0.03, 0.25) * side
    style = rng.choice(("stripes", "checks", "dots", "grid"))
    n = int(side / pitch) + 2
    if style == "stripes":
        turn = rng.uniform(0, pi)
        dx, dy = cos(turn), sin(turn)
        for i in range(-2 * n, 2 * n):
            x, y = side / 2 + dx * i * pitch, side / 2 + dy * i * pitch
            draw.line([(x - dy * 2 * side, y + dx * 2 * side), (x + dy * 2 * side, y - dx * 2 * side)], b, max(1, round(pitch / 2)))
    else:
        for i in range(n):
            for j in range(n):
                x, y = i * pitch, j * pitch
                if style == "checks" and (i + j) % 2:
                    draw.rectangle((x, y, x + pitch, y + pitch), b)
                elif style == "dots":
                    draw.ellipse((x, y, x + pitch * 0.5, y + pitch * 0.5), b)
                elif style == "grid":
                    draw.rectangle((x, y, x + pitch, y + pitch), None, b, max(1, round(pitch / 20)))
    return image


def _clutter(rng: Random, side: int) -> Image.Image:
    image = _gradient(rng, side)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(2, 14)):
        x, y = rng.uniform(0, side), rng.uniform(0, side)
        w, h = rng.uniform(0.02, 0.5) * side, rng.uniform(0.02, 0.5) * side
        box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        rng.choice((draw.ellipse, draw.rectangle))(box, any_color(rng))
    return image.filter(ImageFilter.BoxBlur(rng.uniform(4, 14))) if rng.random() < 0.7 else image


def _room(rng: Random, side: int) -> Image.Image:
    """A wall and a floor, or a sky and a field."""
    image = (_gradient if rng.random() < 0.5 else _texture)(rng, side)
    lower = rng.choice((_gradient, _texture, _stripes))(rng, side)
    horizon = round(rng.uniform(0.4, 0.85) * side)
    image.paste(lower.crop((0, horizon, side, side)), (0, horizon))
    return image.filter(ImageFilter.BoxBlur(rng.uniform(1, 8))) if rng.random() < 0.4 else image


def ground(rng: Random, side: int) -> tuple[Image.Image, str | None]:
    """A ground of the given side, and the name of its color if it is plain and has one."""
    dice = rng.random()
    if dice < 0.15:
        name = rng.choice(list(COLORS))
        return Image.new("RGB", (side, side), jitter(rng, COLORS[name], 10)), name
    if dice < 0.35:
        return Image.new("RGB", (side, side), (255, 255, 255) if rng.random() < 0.4 else any_color(rng)), None
    return textured_ground(rng, side), None


def textured_ground(rng: Random, side: int) -> Image.Image:
    """A ground that is not of one color."""
    style = rng.choices((_gradient, _blobs, _texture, _stripes, _clutter, _room), (2, 3, 4, 2, 3, 3))[0]
    return style(rng, side)


@cache
def _named_colors() -> tuple[tuple[str, ...], np.ndarray]:
    """Colors that a pixel may be called by, several shades for a name."""
    shades = {
        "red": ((214, 40, 40), (170, 20, 30), (240, 70, 70)), "green": ((38, 150, 60), (90, 190, 80), (20, 95, 40), (130, 200, 60)),
        "blue": ((40, 80, 215), (90, 160, 240), (30, 50, 120), (0, 130, 210)), "yellow": ((242, 214, 40), (255, 235, 110)),
        "purple": ((140, 50, 170), (170, 110, 220), (90, 40, 130)), "orange": ((245, 135, 25), (230, 110, 40)),
        "pink": ((245, 150, 190), (235, 90, 160)), "brown": ((125, 75, 40), (90, 50, 25), (160, 105, 65)),
        "gray": ((128, 128, 128), (165, 165, 165), (95, 95, 95)), "white": ((250, 250, 250),),
        "black": ((16, 16, 16), (40, 40, 40)),
    }  # fmt: skip
    names = tuple(name for name, group in shades.items() for _ in group)
    return names, np.array([shade for group in shades.values() for shade in group], np.float32)


def color_name(image: Image.Image) -> str | None:
    """The color that most of a drawing clearly has, if it has one."""
    small = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32).reshape(-1, 4)
    pixels = small[small[:, 3] > 128, :3]
    if len(pixels) < 24:
        return None
    names, shades = _named_colors()
    distances = ((pixels[:, None] - shades[None]) ** 2).sum(-1)
    nearest, near = distances.argmin(1), distances.min(1) < 42**2
    counts: dict[str, int] = {}
    for index in nearest[near]:
        counts[names[index]] = counts.get(names[index], 0) + 1
    best = max(counts, key=counts.__getitem__, default=None)
    return best if best and counts[best] > 0.65 * len(pixels) else None


# What is done to a drawing. All of it takes and gives RGBA.


def _recolor(rng: Random, image: Image.Image, strength: float) -> Image.Image:
    """Turn the hue, weaken or strengthen the colors, change brightness and contrast: one matrix for all."""
    turn = radians(rng.gauss(0, 25) if rng.random() < 0.6 else rng.uniform(-180, 180)) * strength
    saturation = rng.choice((0.0, rng.uniform(0.2, 0.8), 1.0, rng.uniform(0.8, 1.5))) if strength > 0.5 else rng.uniform(0.85, 1.15)
    luma = np.array([[0.299, 0.587, 0.114]] * 3)
    third, root = (1 - cos(turn)) / 3, sin(turn) / sqrt(3)
    hue = np.full((3, 3), third) + np.diag([cos(turn)] * 3) + root * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    gain = rng.uniform(1 - 0.35 * strength, 1 + 0.3 * strength)
    matrix = gain * (saturation * np.eye(3) + (1 - saturation) * luma) @ hue
    offset = rng.uniform(-30, 40) * strength + (1 - gain) * 110
    rows = np.concatenate([matrix, np.full((3, 1), offset)], axis=1)
    out = image.convert("RGB").convert("RGB", tuple(rows.ravel().tolist()))
    out.putalpha(image.getchannel("A"))
    return out


def _edges(image: Image.Image) -> Image.Image:
    """The lines of a drawing, white on black."""
    flat = Image.new("RGB", image.size, (255, 255, 255))
    flat.paste(image, mask=image.getchannel("A"))
    r, g, b = flat.filter(ImageFilter.SMOOTH).filter(ImageFilter.FIND_EDGES).split()
    return ImageChops.lighter(ImageChops.lighter(r, g), b)


def _ink(rng: Random, image: Image.Image) -> Image.Image:
    """Dark lines around and inside, as many designers draw; sometimes the lines alone."""
    width = rng.choice((3, 5, 7))
    padded = ImageOps.expand(image, width, (0, 0, 0, 0))
    alpha = padded.getchannel("A")
    color = (0, 0, 0) if rng.random() < 0.7 else (rng.randint(0, 90), rng.randint(0, 90), rng.randint(0, 90))
    lines = _edges(padded).point(lambda v: min(255, v * 3) if v > 24 else 0)
    rim = alpha.filter(ImageFilter.BoxBlur(width // 2)).point(lambda a: min(255, a * 4))
    fill = padded.convert("RGB")
    if rng.random() < 0.25:
        fill = Image.new("RGB", padded.size, jitter(rng, (245, 245, 245), 10) if rng.random() < 0.7 else any_color(rng))
    elif rng.random() < 0.3:
        fill = Image.blend(fill, Image.new("RGB", padded.size, (255, 255, 255)), rng.uniform(0.2, 0.7))
    inked = Image.composite(Image.new("RGB", padded.size, color), fill, lines)
    out = Image.new("RGB", padded.size, color)
    out.paste(inked, mask=alpha)
    out.putalpha(rim)
    return out


def _flatten(rng: Random, image: Image.Image) -> Image.Image:
    """A few flat colors instead of shades."""
    alpha = image.getchannel("A")
    out = image.convert("RGB").quantize(rng.randint(3, 10), Image.Quantize.FASTOCTREE).convert("RGB")
    out.putalpha(alpha)
    return out


def _thin(rng: Random, image: Image.Image) -> Image.Image:
    alpha = image.getchannel("A")
    image.putalpha(alpha.filter((ImageFilter.MinFilter if rng.random() < 0.6 else ImageFilter.MaxFilter)(3)))
    return image


def shrink(image: Image.Image, longest: float) -> Image.Image:
    """A drawing no larger than it will be shown, before it is changed: the rest would be lost work."""
    scale = longest / max(image.size)
    if scale > 0.8:
        return image
    size = max(4, round(image.width * scale)), max(4, round(image.height * scale))
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _grain(rng: Random, image: Image.Image) -> Image.Image:
    """Light from one side and a rough surface, as things in photographs have."""
    alpha, rgb = image.getchannel("A"), image.convert("RGB")
    light = Image.linear_gradient("L").rotate(rng.uniform(0, 360)).crop((40, 40, 216, 216)).resize(image.size)
    light = Image.blend(light, noise(rng, image.size, rng.randint(0, 5)), rng.uniform(0.1, 0.6))
    low = rng.uniform(0.4, 0.8)
    light = light.point(lambda v: int(255 * low + v * (1 - low)))
    out = ImageChops.multiply(rgb, Image.merge("RGB", [light] * 3))
    out.putalpha(alpha)
    return out


def _cut(rng: Random, image: Image.Image) -> Image.Image:
    """Lose up to a fifth at one or two sides."""
    w, h = image.size
    left, top, right, bottom = (rng.uniform(0, 0.2) if rng.random() < 0.4 else 0.0 for _ in range(4))
    return image.crop((round(w * left), round(h * top), round(w * (1 - right)), round(h * (1 - bottom))))


def vary(rng: Random, image: Image.Image) -> Image.Image:
    """Change a drawing as another designer might have drawn it; for training alone."""
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if rng.random() < 0.12:
        image = _cut(rng, image)
    if rng.random() < 0.2:
        image = _flatten(rng, image)
    if rng.random() < 0.6:
        image = _recolor(rng, image, 1.0)
    if rng.random() < 0.35:
        image = _ink(rng, image)
    elif rng.random() < 0.15:
        image = _thin(rng, image.copy())
    if rng.random() < 0.15:
        image = _grain(rng, image)
    if rng.random() < 0.1:
        alpha = image.getchannel("A")
        image = ImageOps.posterize(image.convert("RGB"), rng.randint(2, 4))
        image.putalpha(alpha)
    if rng.random() < 0.12:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
    return image


def fit(rng: Random, image: Image.Image, longest: float, *, strong: bool) -> Image.Image:
    """Scale a drawing to the longest side given; turn, stretch and shear it: little, or much if `strong`."""
    stretch = rng.uniform(0.75, 1.33) if strong and rng.random() < 0.5 else 1.0
    turn = rng.gauss(0, 14) if strong else rng.uniform(-8, 8)
    width, height = image.width * stretch, image.height / stretch
    scale = longest / max(width, height)
    size = max(4, round(width * scale)), max(4, round(height * scale))
    image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if strong and rng.random() < 0.25:
        shear = rng.uniform(-0.25, 0.25)
        pad = round(abs(shear) * image.height / 2)
        image = ImageOps.expand(image, (pad, 0, pad, 0), (0, 0, 0, 0))
        image = image.transform(image.size, Image.Transform.AFFINE, (1, shear, -shear * image.height / 2, 0, 1, 0),
                                Image.Resampling.BILINEAR)  # fmt: skip
    if (strong and rng.random() < 0.7) or (not strong and rng.random() < 0.5):
        image = image.rotate(turn, Image.Resampling.BILINEAR, expand=True)
    box = image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox()
    return image.crop(box) if box else image


def _weights(alpha: Image.Image) -> np.ndarray:
    return np.asarray(alpha.resize((8, 8), Image.Resampling.BOX), float).ravel() + 1e-3


def place(rng: Random, canvas: Image.Image, image: Image.Image, left: int, top: int) -> None:
    """Put a drawing on the canvas, sometimes with its shadow; with a bright or dark glow where it would hardly be seen."""
    alpha = image.getchannel("A")
    red, green, blue, _ = np.average(
        np.asarray(image.resize((8, 8), Image.Resampling.BOX), float).reshape(64, 4), 0, _weights(alpha)
    )
    behind = mean(canvas, (left, top, left + image.width, top + image.height))
    if distance((red, green, blue), behind) < 60:
        glow = ImageOps.expand(alpha, 16, 0).filter(ImageFilter.BoxBlur(rng.uniform(4, 8))).point(lambda a: min(255, a * 2))
        canvas.paste(contrast(rng, (round(red), round(green), round(blue))), (left - 16, top - 16), glow)
    if rng.random() < 0.3:
        blur = rng.uniform(1, 8)
        shade = ImageChops.multiply(alpha, Image.new("L", alpha.size, rng.randint(50, 150)))
        shade = ImageOps.expand(shade, 12, 0).filter(ImageFilter.BoxBlur(blur))
        dx, dy = rng.randint(-10, 10), rng.randint(0, 12)
        canvas.paste((0, 0, 0), (left - 12 + dx, top - 12 + dy), shade)
    canvas.paste(image, (left, top), alpha)


def shoot(rng: Random, image: Image.Image, *, strong: bool) -> Image.Image:
    """What a camera and a file format do to a picture: blur, noise, exposure, JPEG."""
    level = 1.0 if strong else 0.4
    if rng.random() < 0.25 * level:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.4, 1.6)))
    if rng.random() < 0.3 * level:
        low, high = rng.uniform(0, 50), rng.uniform(205, 255)
        table = [int(low + v * (high - low) / 255) for v in range(256)]
        image = image.point(table * 3)
    if rng.random() < 0.3 * level:
        octave = rng.choice((0, 0, 1))
        gray = [noise(rng, image.size, octave)] * 3
        tile = Image.merge("RGB", gray if rng.random() < 0.5 else [noise(rng, image.size, octave) for _ in range(3)])
        image = Image.blend(image, tile, rng.uniform(0.03, 0.14))
    if rng.random() < 0.3 * level:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(25, 90))
        image = Image.open(buffer).convert("RGB")
    return image


def coarsen(rng: Random, image: Image.Image, pixels: int) -> Image.Image:
    """The picture as if it had been so many pixels wide."""
    small = image.resize((pixels, pixels), rng.choice((Image.Resampling.BOX, Image.Resampling.BILINEAR)))
    up = rng.choice((Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BICUBIC))
    return small.resize(image.size, up)


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """How far apart two colors are."""
    return sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def mean(image: Image.Image, box: tuple[float, float, float, float]) -> tuple[float, ...]:
    """The mean color of a part of a picture; the box in pixels."""
    x0, y0, x1, y1 = (round(v) for v in box)
    return tuple(image.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))  # type: ignore[arg-type]


def contrast(rng: Random, color: Rgb) -> Rgb:
    """Black or white or near them, whichever stands out from a color."""
    return jitter(rng, (12, 12, 12) if luma(color) > 128 else (245, 245, 245), 12)


def luma(color: Rgb) -> float:
    """How bright a color is, 0 to 255."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
