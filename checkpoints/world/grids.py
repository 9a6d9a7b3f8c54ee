"""A board of three by three or four by four cells, some of them filled."""

from __future__ import annotations

from random import Random

from checkpoints.world.scene import COLORS, NUMBERS, SIZE, Mark, Scene, article, backdrop, paint

WHATS = ("cell", "gap")
TYPES = ("cell", "count_filled", "count_empty", "count_color", "rows", "exists", "row", "describe")


def draw(rng: Random) -> Scene:
    n = rng.choice((3, 4))
    palette = rng.sample(list(COLORS), rng.randint(2, 4))
    share = rng.uniform(0.3, 0.8)
    board = [[rng.choice(palette) if rng.random() < share else None for _ in range(n)] for _ in range(n)]
    if not any(any(row) for row in board):
        board[rng.randrange(n)][rng.randrange(n)] = palette[0]
    canvas = backdrop(rng)
    pitch = rng.uniform(0.85, 0.95) * SIZE / n
    left, top = rng.uniform(1, SIZE - 1 - n * pitch), rng.uniform(1, SIZE - 1 - n * pitch)
    canvas.rectangle((left, top, left + n * pitch, top + n * pitch), (200, 200, 205))
    marks, inset = [], rng.uniform(1, 2.5)
    for r, row in enumerate(board):
        for c, color in enumerate(row):
            x, y = left + c * pitch, top + r * pitch
            if color:
                canvas.rectangle((x + inset, y + inset, x + pitch - inset, y + pitch - inset), paint(rng, color))
            marks.append(Mark((x, y, x + pitch, y + pitch), "cell" if color else "gap", color, r * 4 + c))
    for i in range(n + 1):
        for line in ([(left + i * pitch, top), (left + i * pitch, top + n * pitch)],
                     [(left, top + i * pitch), (left + n * pitch, top + i * pitch)]):  # fmt: skip
            canvas.line(line, (60, 60, 60))
    scene = Scene("grids", canvas.finish(rng), marks)
    _ask(scene, rng, board, palette)
    _drill(scene, rng, board)
    return scene


def _ask(scene: Scene, rng: Random, board: list[list[str | None]], palette: list[str]) -> None:
    ask = scene.ask
    n = len(board)
    cells = [cell for row in board for cell in row]
    r, c = rng.randrange(n), rng.randrange(n)
    row, column = (str(r + 1), str(c + 1)) if rng.random() < 0.5 else (NUMBERS[r + 1], NUMBERS[c + 1])
    ask(rng, "cell", ("What is in row {r}, column {c}?", "What color is the cell in row {r}, column {c}?",
                      "What is at row {r} and column {c}?", "Which color is in column {c}, row {r}?"),
        board[r][c] or "nothing", r=row, c=column)  # fmt: skip
    ask(rng, "count_filled", ("How many cells are filled?", "How many filled cells are there?", "Count the filled cells."),
        NUMBERS[sum(cell is not None for cell in cells)])  # fmt: skip
    ask(rng, "count_empty", ("How many cells are empty?", "How many empty cells are there?", "Count the empty cells."),
        NUMBERS[sum(cell is None for cell in cells)])  # fmt: skip
    color = rng.choice(palette)
    ask(rng, "count_color", ("How many cells are {c}?", "How many {c} cells are there?", "Count the {c} cells."),
        NUMBERS[cells.count(color)], c=color)  # fmt: skip
    ask(rng, "rows", ("How many rows does the board have?", "How many rows are there?", "How many columns are there?",
                      "How many columns does the grid have?"), NUMBERS[n])  # fmt: skip
    present = sorted({cell for cell in cells if cell})
    color = rng.choice(present if rng.random() < 0.5 else [x for x in COLORS if x not in present])
    ask(rng, "exists", ("Is there {a}?", "Is there {a} on the board?", "Can you see {a}?", "Is any cell {c}?"),
        "yes" if color in present else "no", a=article(f"{color} cell"), c=color)  # fmt: skip
    r = rng.randrange(n)
    ask(rng, "row", ("What is in row {r}?", "List the cells of row {r}.", "Which colors are in row {r}?"),
        ", ".join(cell or "nothing" for cell in board[r]), r=str(r + 1) if rng.random() < 0.5 else NUMBERS[r + 1])  # fmt: skip
    rows = "; ".join(", ".join(cell or "nothing" for cell in row) for row in board)
    ask(rng, "describe", ("Describe the picture.", "What is in the picture?", "Describe this image.",
                          "Tell me what you see."), f"The board has {NUMBERS[n]} rows: {rows}.")  # fmt: skip


def _drill(scene: Scene, rng: Random, board: list[list[str | None]]) -> None:
    cells = [cell for row in board for cell in row]
    scene.drill(rng, "cell", [(f"row {r + 1}, column {c + 1}", cell or "nothing")
                              for r, row in enumerate(board) for c, cell in enumerate(row)])  # fmt: skip
    present = [c for c in COLORS if c in cells]
    asked = present + rng.sample([c for c in COLORS if c not in present], 1)
    scene.drill(rng, "count_color", [(c, NUMBERS[cells.count(c)]) for c in asked])
    scene.drill(rng, "exists", [(c, "yes" if c in cells else "no") for c in COLORS])
