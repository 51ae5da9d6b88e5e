"""Files of a folder and their captions: beside them as .txt or .json, or in a metadata file."""

from __future__ import annotations

import csv
import importlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jvpgraph.trainer.prepare.media import IMAGES, VIDEOS, BadFile

CAPTIONS = ("text", "caption", "prompt")  # under which json, jsonl, csv and parquet keep a caption
FILES = ("file_name", "file", "path")  # and the file that it is of
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass
class Found:
    """Pictures and clips with their captions, in the order of their names; and what is left out, and why."""

    captions: dict[str, str] = field(default_factory=dict)  # by path in the folder
    skipped: dict[str, str] = field(default_factory=dict)  # path -> reason
    ignored: Counter[str] = field(default_factory=Counter)  # files of other kinds, by their ending


def find(folder: Path, default: str | None) -> Found:
    """All files of a folder and those below it; hidden ones are not looked at.

    Args:
        folder: with pictures or clips.
        default: the caption of files that have none.

    Raises:
        ValueError: a metadata file cannot be read.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    media = [name for name in names if name.lower().endswith((*IMAGES, *VIDEOS))]
    stems = {name.rpartition(".")[0] for name in media}
    found = Found()
    listed: dict[str, str | None] = {}
    for name in names:
        ending = Path(name).suffix.lower()
        if Path(name).name in METADATA:
            rows = captions_of(folder / name, name)
            listed |= rows
            absent = sorted(rows.keys() - set(media))
            found.skipped |= dict.fromkeys(absent, f"a row of {name}, and there is no such picture or clip")
        elif ending in (".txt", ".json"):
            if name.rpartition(".")[0] not in stems:
                found.skipped[name] = "a caption, and there is no picture or clip of its name"
        elif name not in media:
            found.ignored[ending or "no ending"] += 1
    for name in media:
        try:
            found.captions[name] = caption_of(folder / name, listed.get(name), default)
        except BadFile as error:
            found.skipped[name] = str(error)
    return found


def caption_of(path: Path, listed: str | None, default: str | None) -> str:
    """A file's caption: listed, else beside it, else the default. Raises BadFile."""
    caption = listed
    text, tree = path.with_suffix(".txt"), path.with_suffix(".json")
    try:
        if caption is None and text.is_file():
            caption = text.read_text(encoding="utf-8")
        if caption is None and tree.is_file():
            caption = named(json.loads(tree.read_text(encoding="utf-8")), CAPTIONS)
            if caption is None:
                raise BadFile(f"{tree.name} has none of the keys {', '.join(CAPTIONS)}")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadFile(f"its caption cannot be read: {' '.join(str(error).split())}") from error
    caption = default if caption is None else caption
    if caption is None:
        raise BadFile(f"no caption: no {text.name}, no {tree.name}, no row of a metadata file")
    if not caption.strip():
        raise BadFile("its caption is empty")
    return caption.strip()


def captions_of(path: Path, name: str) -> dict[str, str | None]:
    """A metadata file's captions, by the path of each file in the folder that is prepared."""
    above = name.rpartition("/")[0]
    captions = {}
    for number, row in enumerate(rows_of(path), 1):
        file = named(row, FILES)
        if file is None:
            raise ValueError(f"{path}, row {number}: none of the keys {', '.join(FILES)}. Add one that names the file.")
        captions[f"{above}/{file}" if above else file] = named(row, CAPTIONS)
    return captions


def rows_of(path: Path) -> Iterator[Any]:
    """The rows of a metadata file. Raises ValueError for one that cannot be read."""
    try:
        if path.suffix == ".jsonl":
            yield from (json.loads(line) for line in lines_of(path))
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                yield from csv.DictReader(file)
        else:
            yield from parquet().read_table(path).to_pylist()
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}. Mend it, or take it away.") from error


def parquet() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "metadata.parquet needs PyArrow: pip install pyarrow, or save the table as metadata.csv"
        ) from error


def named(row: Any, keys: tuple[str, ...]) -> str | None:
    """The first of the keys that a row has a text under."""
    if not isinstance(row, Mapping):
        return None
    return next((row[key] for key in keys if isinstance(row.get(key), str)), None)


def prompts_of(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises ValueError."""
    try:
        return lines_of(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}. Save it as one, a prompt a line.") from error


def lines_of(path: Path) -> list[str]:
    """Those that hold something. Text may hold what str.splitlines takes for an end of line, such as U+2028."""
    with path.open(encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]
