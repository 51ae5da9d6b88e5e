"""What people train with, small: stages and settings by name, for the tests that hold for all of them."""

from __future__ import annotations

from typing import Any

from tests.test_train import RCM, stage

STEPS = 4


def alone(objective: Any, **more: Any) -> dict[str, Any]:
    return {"stages": [stage(objective, STEPS)], **more}


RECIPES: dict[str, dict[str, Any]] = {
    "rcm": alone(RCM),
    "scm": alone("scm"),
    "dmd": alone({"name": "dmd", "fake_updates_per_step": 2}),
    "dcm": alone("dcm"),
    "mean_flow": alone("mean_flow"),
    "flow_matching": alone("flow_matching"),
}
