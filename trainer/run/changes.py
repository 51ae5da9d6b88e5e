"""Which settings of a run may change between a stop and going on: RULES says which, changes.jsonl what did and when."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from jvpgraph.trainer import settings
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.files import naming
from jvpgraph.trainer.objectives import Objective

CHANGES = "changes.jsonl"

FREE, ASKED, NEVER = "free", "with --change", "never"
RULES = {
    "out": FREE,  # the folder was moved
    "device": FREE,  # of the same kind; random numbers of another kind of device need --change device
    "threads": FREE,
    "parallel": FREE,
    "checkpoint": FREE,
    "log": FREE,
    "sampling": FREE,
    "evaluation": FREE,
    "validation": FREE,
    "watch": FREE,
    "student.backend": FREE,  # other processes may need others
    "student.compile": FREE,
    "student.checkpoint_blocks": FREE,
    "ema.snapshot_every": FREE,
    "ema.device": FREE,
    "teacher.offload": FREE,
    "fake_score": FREE,
    "fake_score.network": NEVER,  # other parameters
    "data.workers": FREE,
    "data.source.options.on_bad_shard": FREE,
    "data": ASKED,  # moved, or other data, which is then read from its beginning
    "model": ASKED,  # moved, or another teacher of the same shape
    "imports": ASKED,
    "teacher": ASKED,
    "precision": ASKED,
    "precision.probe_every": FREE,
    "precision.probe_limit": FREE,
    "guidance": ASKED,
    "conditions": ASKED,
    "stages": ASKED,
    "stages.*.objective.name": NEVER,  # another objective keeps other things in a checkpoint: see also `kept_for`
    "stages.*.objective.terms": NEVER,
    "stages.*.objective.terms.*.weight": ASKED,
    "stages.*.objective.terms.*.after": ASKED,
    "stages.*.objective.terms.*.objective": ASKED,
    "stages.*.student.kind": NEVER,  # other moments
    "stages.*.fake.kind": NEVER,
    "stages.*.critic.kind": NEVER,
    "seed": NEVER,  # the order of the data follows from it
    "student": NEVER,  # other parameters
    "ema": NEVER,  # averages cannot begin in the middle
}
"""By key, for all below it; the longest key counts. Whatever may change may change the last bits.

Of a stage that has not begun all may change when asked for: no checkpoint has anything of it.
"""


def kept_for(objective: Objective) -> tuple[Any, ...]:
    """What a checkpoint holds for an objective beside the student, which neither comes nor goes in the middle."""
    critic, samples = objective.critic, objective.simulated
    heads = None if critic is None else (critic.features, critic.blocks, critic.width)
    return objective.fake_score is not None, heads, samples is not None and samples.earlier is not None


def rule(key: str) -> str:
    """What RULES says of a dotted key."""
    matches = [pattern for pattern in RULES if re.match(rf"{_as_regex(pattern)}(\.|$)", key)]
    return RULES[max(matches, key=len)]


def _as_regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", r"\d+")


def table() -> str:
    """RULES, a line for each answer."""
    keys = {answer: [key for key, found in RULES.items() if found == answer] for answer in (FREE, ASKED, NEVER)}
    return "\n".join(f"  {answer}: {', '.join(found)}" for answer, found in keys.items())


def check_changes(old: RunConfig, new: RunConfig, asked: Sequence[str], done: int) -> list[str]:
    """What is different in `new` and is not free, one line each.

    A run may be made longer: stages may be added, and its last stage may get more steps if its learning rates are
    constant.

    Args:
        old: settings of the run in the folder.
        new: those it is to go on with.
        asked: keys of --change; each counts for all below it.
        done: the step it goes on from.

    Raises:
        ValueError: something differs that may not, or was not asked for.
    """
    lines = settings.differences(old, shortened(new, old))
    differences = {line: _kind_of(line, old, new, done) for line in lines}
    differences = {line: kind for line, kind in differences.items() if kind != FREE}
    refused = {line: kind for line, kind in differences.items() if kind == NEVER or not covered(key_of(line), asked)}
    if refused:
        shown = [f"{line}{' (cannot change within a run)' * (kind == NEVER)}" for line, kind in refused.items()]
        raise ValueError(
            f"{new.out} holds a run with other settings:\n  " + "\n  ".join(shown) + f"\n{advice(refused, new)}"
        )
    return list(differences)


def advice(refused: dict[str, str], new: RunConfig) -> str:
    if NEVER in refused.values():
        return (
            "Give the same settings to resume that run; or begin another one from its weights, with another `out` and "
            f"--from {new.out}; or --fresh to move it aside."
        )
    options = " ".join(f"--change {key_of(line)}" for line in refused)
    return (
        f"Add {options} to go on with the new ones; or give the same settings, another `out`, or --fresh to move it "
        "aside."
    )


def _kind_of(line: str, old: RunConfig, new: RunConfig, done: int) -> str:
    key, now = key_of(line), place_of(old, done)
    if found := re.match(r"stages\.(\d+)\.(objective)?", key):
        index = int(found[1])
        if now is not None and index > now[0]:
            return ASKED
        if found[2] and kept_for(old.stages[index].objective) != kept_for(new.stages[index].objective):
            return NEVER
    if re.fullmatch(r"stages\.\d+\.objective(\.terms\.\d+\.objective)?", key):
        return NEVER  # where the names differ, there is one line for all
    if re.fullmatch(r"stages(\.\d+(\.steps)?)?", key) and now != place_of(new, done):
        return NEVER  # the step would belong to another stage, or to none
    return rule(key)


def place_of(config: RunConfig, done: int) -> tuple[int, int] | None:
    """Which stage a step belongs to, and its number in there; None beyond the last."""
    ends = list(accumulate(stage.steps for stage in config.stages))
    return next(((i, done - end) for i, end in enumerate([0, *ends[:-1]]) if done <= ends[i]), None)


def key_of(line: str) -> str:
    """Of a line of `settings.differences`."""
    return line.partition(": ")[0]


def covered(key: str, asked: Sequence[str]) -> bool:
    """Whether one of the keys of --change is this one or one above it."""
    return any(f"{key}.".startswith(f"{above}.") for above in asked)


def shortened(config: RunConfig, old: RunConfig) -> RunConfig:
    """A run without what it has been made longer by."""
    stages = config.stages[: len(old.stages)]
    if len(stages) < len(old.stages):
        return config
    last, before = stages[-1], old.stages[-1]
    if last.steps > before.steps and {last.student.decay, last.fake.decay, last.critic.decay} == {"constant"}:
        stages = (*stages[:-1], replace(last, steps=before.steps))
    return replace(config, stages=stages)


def record_changes(folder: Path, step: int, changes: Sequence[str]) -> None:
    """A line in changes.jsonl: after which step, when, and what."""
    if changes:
        path = folder / CHANGES
        line = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "changes": list(changes)}
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
