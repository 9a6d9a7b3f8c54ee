"""Whether a picture can be drawn where it is wanted: told before anything is asked."""

from __future__ import annotations

from pathlib import Path


def check(path: Path) -> None:
    """Raises ValueError where no picture could be drawn."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ValueError("--picture needs matplotlib; install it with `pip install -e '.[plot]'`") from error
    if (kind := path.suffix.removeprefix(".").lower()) not in (known := FigureCanvasBase.get_supported_filetypes()):
        raise ValueError(f"--picture: {path.name} must end in one of .{', .'.join(sorted(known))}, not in {kind!r}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--picture: {path.parent} is not a directory")
