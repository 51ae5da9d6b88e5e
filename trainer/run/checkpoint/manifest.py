"""What a complete checkpoint has in it: size and CRC-32 of every file, written last."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jvpgraph.trainer.files import write_whole

MANIFEST = "manifest.json"
CHUNK = 16 * 2**20  # bytes read at a time for a checksum


def write_manifest(folder: Path, step: int, ranks: int, files: Mapping[str, Mapping[str, int]]) -> None:
    body = {"format": 1, "step": step, "ranks": ranks, "files": files}
    write_whole(folder / MANIFEST, json.dumps({**body, "crc32": _json_checksum(body)}, indent=1))


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises:
    ValueError: it is not what was written.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.pop("crc32", None) != _json_checksum(manifest):
        raise ValueError("the checksum does not match")
    return manifest


def damage(path: Path, *, checksums: bool, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint, or None. `share` (i, n): compute the checksums of every n-th file only."""
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was never complete"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is damaged ({error})"
    if not path.name.startswith(f"step-{manifest['step']:08d}"):
        return f"it is a copy of the checkpoint of step {manifest['step']}"
    faults = []
    for i, (name, wanted) in enumerate(sorted(manifest["files"].items())):
        try:
            size = (path / name).stat().st_size
            if size != wanted["bytes"]:
                faults.append(f"{name} has {size} bytes of {wanted['bytes']}")
            elif checksums and i % share[1] == share[0] and summary(path / name) != wanted:
                faults.append(f"{name} has other content than was written (checksum)")
        except FileNotFoundError:
            faults.append(f"{name} is missing")
        except OSError as error:
            faults.append(f"{name} cannot be read ({error})")
    return "; ".join(faults) or None


def summary(path: Path) -> dict[str, int]:
    """Size in bytes and CRC-32."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": crc}


def fingerprint(path: Path) -> Any:
    try:
        stats = [(p.name, p.stat()) for p in sorted(path.iterdir())]
    except OSError:
        return None
    return [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in stats]


def _json_checksum(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
