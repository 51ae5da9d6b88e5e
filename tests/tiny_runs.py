"""Settings of a run of a second."""

from __future__ import annotations

from typing import Any

STEPS = 4
TINY: dict[str, Any] = {
    "out": "run",
    "model": {"load": "jvpgraph.trainer.dit:dit", "options": {"width": 16, "depth": 1, "heads": 2}},
    "student": {"backend": "eager"},
    "device": "cpu",
    "threads": 1,
    "stages": [{"steps": STEPS, "batch": 4, "objective": {"name": "dcm"}, "student": {"lr": 1e-3}}],
    "ema": {"sigma_rel": [0.1]},
    "checkpoint": {"every": 1, "keep": 9},
    "log": {"every": 1},
}
