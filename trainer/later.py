"""Modules that take long to import, for code that may not need them: `--help` does without torch.

if TYPE_CHECKING:
    from jvpgraph.trainer.run import finished
else:
    finished = later("jvpgraph.trainer.run.finished")
"""

from __future__ import annotations

import importlib
from typing import Any


class Later:
    """Stands for a module, which is imported when something of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


def later(name: str) -> Any:
    return Later(name)
