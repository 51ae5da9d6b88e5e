"""What a stage of ``make gpu`` is given, and keeps its results in. Imports nothing that has to be installed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

PEER = "jvp_flash_attention"


class Part:
    """The results of one stage, and when it has to be done."""

    def __init__(self, path: Path, results: Path, seconds: float, dry_run: bool) -> None:
        self.path, self.results, self.dry_run = path, results, dry_run
        self.deadline = time.monotonic() + seconds
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    def save(self, **more: Any) -> None:
        self.data |= more
        scratch = self.path.with_suffix(".new")
        scratch.write_text(json.dumps(self.data))
        scratch.replace(self.path)

    def of(self, stage: str) -> dict[str, Any]:
        """What an earlier stage found."""
        if not self.results.exists():
            return {}
        return json.loads(self.results.read_text())["stages"].get(stage, {})
