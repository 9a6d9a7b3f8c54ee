"""Which Espalier this is."""

from importlib import metadata


def version() -> str:
    """The installed package's version; 0 in a checkout that is not installed."""
    try:
        return metadata.version("espalier")
    except metadata.PackageNotFoundError:
        return "0"
