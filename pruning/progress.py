"""What a long run shows while it goes on."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.run_state import RunState


def progress_bar(console: Console) -> Progress:
    """Of tasks that have a name and a number of steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def tell_resumed(run_state: RunState, console: Console) -> None:
    """Say so if finished parts of a run that was stopped are used."""
    if run_state.resumed:
        console.print(f"going on with the run in {run_state.directory}", highlight=False)
