"""Ready settings, a file by each name: for the digits, and for published networks."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def ready(name: str) -> Path:
    """The YAML file of ready settings. Raises FileNotFoundError, naming those there are."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"there are no ready settings {name!r}; there are {', '.join(names())}")
    return path
