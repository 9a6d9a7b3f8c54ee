"""The documents keep their form, and name only what exists."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

import espalier
from server.settings import Settings

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOREIGN = {"F", "torch", "LlavaForConditionalGeneration", "image_url", "pruning", "DIR"}
"""Names before a dot that are others' or fields of JSON."""
FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*(?:/|\.(?:py|md|h|cpp|toml|json|jsonl|txt|safetensors))")
VERDICT = re.compile(r"## \d{4}-\d\d-\d\d: .+: (kept|dropped|measured|superseded)\b")

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=[path.name for path in DOCUMENTS])


def prose(text: str) -> Iterator[str]:
    """The lines that are neither code, table nor picture."""
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if not fenced and not line.startswith(("```", "|", "    ", "!")):
            yield line


def spans(text: str) -> set[str]:
    """What stands between backticks."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```|^    .*?$", "", text, flags=re.DOTALL | re.MULTILINE)))


@cache
def files() -> frozenset[str]:
    """Paths of all files and directories, relative to the root; directories end in a slash."""
    roots = [path for path in ROOT.iterdir() if not path.name.startswith(".") or path.name == ".ci"]
    found = [*roots, *(path for root in roots if root.is_dir() for path in root.rglob("*"))]
    return frozenset(path.relative_to(ROOT).as_posix() + "/" * path.is_dir() for path in found)


@cache
def symbols() -> dict[str, set[str]]:
    """By class, and by module as `levels`: what it defines."""
    found: dict[str, set[str]] = {}
    for name in files():
        if name.endswith(".py") and not name.startswith("tests/"):
            tree = ast.parse((ROOT / name).read_text())
            found.setdefault(Path(name).stem, set()).update(defined(tree))
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, set()).update(defined(node))
    return found


def defined(tree: ast.AST) -> Iterator[str]:
    """Functions, classes, variables and attributes of self, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


@cache
def options() -> dict[str, set[str]]:
    """The options of each command, such as `bench engine`."""
    found: dict[str, set[str]] = {}

    def walk(command: object, name: str) -> None:
        for sub, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{name} {sub}".strip())
        found[name] = {"--help", *(flag for p in command.params for flag in (*p.opts, *p.secondary_opts))}  # type: ignore[attr-defined]

    walk(typer.main.get_command(espalier.app), "")
    return found


@documents
def test_prose_lines_are_short(path: Path) -> None:
    assert [line for line in prose(path.read_text()) if len(line) > 160] == []


@documents
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


@documents
def test_named_files_exist(path: Path) -> None:
    names = {word for span in spans(path.read_text()) for word in span.split() if FILE.fullmatch(word)}
    assert [name for name in names if not any(f"/{one}".endswith(f"/{name}") for one in files())] == []
    modules = {module.replace(".", "/") for module in re.findall(r"python -m ([\w.]+)", path.read_text())}
    assert modules - {"pytest", "pip", "lmms_eval"} <= {file.removesuffix(".py") for file in files()}


@documents
def test_named_symbols_exist(path: Path) -> None:
    """`Class.member`, `module.function`, and `symbol` beside its `file.py`."""
    text = path.read_text()
    missing = []
    for span in spans(text):
        dotted = re.fullmatch(r"(\w+)\.(\w+)(?:\(.*\))?", span)
        if dotted and dotted[1] not in FOREIGN and not FILE.fullmatch(span) and dotted[2] not in symbols().get(dotted[1], set()):
            missing.append(span)
    pairs = re.findall(r"`(\w+)`,? (?:in )?`([\w/]+\.py)`", text)
    pairs += [(symbol, file) for file, symbol in re.findall(r"`([\w/]+\.py)` \(`(\w+)`\)", text)]
    missing += [f"{symbol} of {file}" for symbol, file in pairs if symbol not in symbols().get(Path(file).stem, set())]
    assert missing == []


@documents
def test_named_options_exist(path: Path) -> None:
    text = path.read_text()
    unknown = []
    for command, rest in re.findall(r"\bespalier ((?:bench )?[a-z]+)\b([^`\n#]*)", text):
        if command in options():
            unknown += [f"{command} {flag}" for flag in re.findall(r"(?<!\S)--[a-z-]+", rest) if flag not in options()[command]]
    every = set().union(*options().values()) | {"--index-url"}
    alone = [span.split()[0] for span in spans(text) if span.startswith("--")]
    assert unknown + [flag for flag in alone if flag not in every] == []


@documents
def test_named_settings_exist(path: Path) -> None:
    names = re.findall(r"\bESPALIER_([A-Z_]+)\b", path.read_text())
    assert [name for name in names if name.lower() not in {*Settings.model_fields, "cache"}] == []  # the cache is not the server's


@documents
def test_named_metrics_exist(path: Path) -> None:
    names = set(re.findall(r"\bespalier_([a-z_]+?)(?:_bucket|_sum|_count)?\b", path.read_text()))
    assert [name for name in names if f'"{name}"' not in (ROOT / "server/metrics.py").read_text()] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_glossary_has_few_words() -> None:
    words = re.findall(r"^- \*\*(.+?)\*\*: ", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    assert 1 <= len(words) <= 25
    assert words == sorted(words, key=str.casefold)


def test_log_titles_are_newest_first_with_a_verdict() -> None:
    titles = re.findall(r"^## .+$", (ROOT / "docs/log.md").read_text(), re.MULTILINE)
    assert [title for title in titles if not VERDICT.match(title)] == []
    dates = [title[3:13] for title in titles]
    assert dates == sorted(dates, reverse=True)


def test_a_request_is_followed_in_eight_functions() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## A request", 1)[1].split("\n## ", 1)[0]
    steps = re.findall(r"^\d+\. `([\w.]+)` in `([\w/.]+)` ", section, re.MULTILINE)
    assert len(steps) == 8
    for name, file in steps:
        tree: ast.AST = ast.parse((ROOT / file).read_text())
        for part in name.split("."):
            tree = next((node for node in ast.walk(tree) if getattr(node, "name", None) == part), ast.Module([], []))
        assert isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef), f"{file} has no function {name}"


def test_readme_shows_the_cards_of_the_embedded_checkpoint() -> None:
    rows = re.findall(r"^\| `(\w+)` (\|.*\|)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    cards = json.loads((ROOT / "checkpoints/embedded/weights/pruned/espalier.json").read_text())["cards"]
    assert dict(rows) == {
        level: f"| {card['accuracy']:.1%} | {card['agreement']:.1%} | {card['flops_ratio']:.0%} | {card['visual_tokens']} | "
        f"{card['kv_bytes'] / 1e3:.0f} kB | {card['first_token_seconds'] * 1e3:.1f} ms |"
        for level, card in cards.items()
    }


def test_names_of_tests_are_short() -> None:
    names = [name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())]
    assert [name for name in names if len(name) > 60] == []
