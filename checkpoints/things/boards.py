"""Boards of cells, some of them filled with a color."""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from checkpoints.things import paint
from checkpoints.things.catalogue import article
from checkpoints.things.paint import ALSO, COLORS
from checkpoints.things.scene import NUMBERS, Asker, Mark, Scene, count

Board = list[list[str | None]]


def draw(rng: Random, hands: tuple[str, ...], side: int, paraphrase: str, strong: bool) -> Scene:
    rows = rng.choice((2, 3, 3, 4, 4, 5))
    columns = rows if rng.random() < 0.6 else rng.choice((2, 3, 4, 5))
    palette = rng.sample(list(COLORS), rng.randint(1, 4))
    share = rng.uniform(0.2, 0.85)
    board: Board = [[rng.choice(palette) if rng.random() < share else None for _ in range(columns)] for _ in range(rows)]
    if not any(any(row) for row in board):
        board[rng.randrange(rows)][rng.randrange(columns)] = palette[0]
    canvas, marks = _paint(rng, side, board, palette)
    if strong and rng.random() < 0.15:
        canvas = paint.coarsen(rng, canvas, rng.choice((96, 160, 224, 320)))
    asker = Asker(rng, paraphrase)
    _ask(asker, board, palette)
    return Scene("boards", paint.shoot(rng, canvas, strong=strong), marks, asker.questions)


def _paint(rng: Random, side: int, board: Board, palette: list[str]) -> tuple[Image.Image, list[Mark]]:
    rows, columns = len(board), len(board[0])
    canvas, _ = paint.ground(rng, side)
    pitch = rng.uniform(0.55, 0.96) * side / max(rows, columns)
    left, top = rng.uniform(0, side - columns * pitch), rng.uniform(0, side - rows * pitch)
    empty = paint.jitter(rng, (205, 205, 205), 45)
    while any(paint.distance(empty, COLORS[c]) < 80 for c in palette):
        empty = paint.any_color(rng)
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((left, top, left + columns * pitch, top + rows * pitch), empty)
    inset = rng.uniform(0.0, 0.2) * pitch
    draw_cell = pen.ellipse if rng.random() < 0.25 else pen.rectangle
    marks = []
    for r, row in enumerate(board):
        for c, color in enumerate(row):
            x, y = left + c * pitch, top + r * pitch
            if color:
                draw_cell((x + inset, y + inset, x + pitch - inset, y + pitch - inset), paint.jitter(rng, COLORS[color], 12))
            box = (x / side, y / side, (x + pitch) / side, (y + pitch) / side)
            marks.append(Mark(box, f"{color} cell" if color else "empty cell", "cell"))
    line, width = paint.contrast(rng, empty), rng.randint(1, 6)
    for i in range(rows + 1):
        pen.line((left, top + i * pitch, left + columns * pitch, top + i * pitch), line, width)
    for i in range(columns + 1):
        pen.line((left + i * pitch, top, left + i * pitch, top + rows * pitch), line, width)
    return canvas, marks


def _ask(asker: Asker, board: Board, palette: list[str]) -> None:
    ask, rng = asker.ask, asker.rng
    cells = [cell for row in board for cell in row]
    present = sorted({cell for cell in cells if cell})
    ask("what", "board", also=("grid", "table", "a board of cells"), sentence="It is a board.")
    r, c = rng.randrange(len(board)), rng.randrange(len(board[0]))
    found = board[r][c]
    spelled = rng.random() < 0.5
    row, column = (NUMBERS[r + 1], NUMBERS[c + 1]) if spelled else (str(r + 1), str(c + 1))
    empty = ("empty", "none", "it is empty")
    ask("cell", found or "nothing", also=ALSO.get(found, ()) if found else empty, r=row, c=column)
    ask("count", **count(sum(cell is not None for cell in cells)), many="filled cells")
    ask("count", **count(sum(cell is None for cell in cells)), many="empty cells")
    color = rng.choice(palette)
    ask("count", **count(cells.count(color)), many=f"{color} cells")
    if rng.random() < 0.5:
        ask("rows", **count(len(board)), many="rows")
    else:
        ask("rows", **count(len(board[0])), many="columns")
    color = rng.choice(present if rng.random() < 0.5 else [x for x in COLORS if x not in present])
    ask("exists", "yes" if color in present else "no", one=article(f"{color} cell"), many=f"{color} cells")
    r = rng.randrange(len(board))
    ask("row", ", ".join(cell or "nothing" for cell in board[r]), also=(", ".join(cell or "empty" for cell in board[r]),),
        r=NUMBERS[r + 1] if spelled else str(r + 1))  # fmt: skip
    told = "; ".join(", ".join(cell or "nothing" for cell in row) for row in board)
    ask("describe", f"The board has {NUMBERS[len(board)]} rows: {told}.", parts=[(c,) for c in present])
