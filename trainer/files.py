"""Files that are whole or not there, also after a power failure."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Replaces a file at once: whoever reads it finds the old or the new one."""
    with draft_of(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` at the end; after an error it is gone."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        with naming(path):
            yield draft
            sync(draft)
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def draft_folder_of(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `path` at the end; after an error it is gone."""
    draft = path.with_name(f".{path.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.replace(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError that names the file if it holds no JSON mapping."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no JSON: {error}. Download or export it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no mapping. Download or export it again.")
    return found


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system in here say which file: a write to a full disk knows none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, last through a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
