"""Settings for a run on prepared data: settings.yaml, which says what was prepared, and run.yaml, ready to train.

A checkpoint of two networks, one for high noise and one for low, is distilled into two students: run.yaml trains the
first one, run_low.yaml the second.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from pathlib import Path
from typing import Any

from jvpgraph.trainer.files import write_whole
from jvpgraph.trainer.prepare.checkpoint import Encoder
from jvpgraph.trainer.prepare.families import LENGTHS
from jvpgraph.trainer.trigflow import radians

SETTINGS, RUN, RUN_LOW = "settings.yaml", "run.yaml", "run_low.yaml"


def write_settings(out: Path, encoder: Encoder, card: dict[str, Any], negative: Path, dtype: str) -> None:
    """All files. A run.yaml that is there stays, as somebody may have changed it.

    Args:
        card: of the data.
        negative: file of the negative prompt.
        dtype: that this preparation computes in.
    """
    write_whole(out / SETTINGS, settings_text(out.resolve(), encoder, card, negative))
    texts = {RUN: run_text(out, encoder, card, dtype)}
    if (boundary := encoder.checkpoint.boundary) is not None:
        texts[RUN_LOW] = low_text(out, encoder, card, boundary)
    for name, text in texts.items():
        if not (out / name).exists():
            write_whole(out / name, text)


def settings_text(here: Path, encoder: Encoder, card: dict[str, Any], negative: Path) -> str:
    """What a run's settings say of checkpoint and data, to be named as their `base`."""
    checkpoint = str(encoder.checkpoint.path.resolve())
    scale = encoder.negative_scale
    guidance: dict[str, Any] = {"scale": scale, "negative_file": str(negative.resolve())}
    if shared := [*encoder.checkpoint.first_frame, *card["constants"], *encoder.checkpoint.told_sizes]:
        guidance["shared"] = shared
    if encoder.family.keep_norm and scale != 1:
        guidance["keep_norm"] = encoder.family.keep_norm
    two = encoder.checkpoint.boundary is not None
    network = str(Path(checkpoint) / "transformer") if two else checkpoint
    teacher = {"model": {"load": "jvpgraph.trainer.adapters:experts", "options": {"path": checkpoint}}}
    tree = {
        "model": {"load": "jvpgraph.trainer.adapters:diffusers_model", "options": {"path": network}},
        **({"teacher": teacher} if two else {}),
        "guidance": guidance,
        "data": {"source": {"load": "jvpgraph.trainer.prepare:prepared", "options": {"path": str(here)}}},
        "sampling": {
            "shift": round(shift_of(encoder, commonest(card)["latents"]), 4),
            "decode": {"load": "jvpgraph.trainer.prepare:decoder", "options": {"checkpoint": checkpoint}},
            "call": call_of(encoder, card),
        },
    }
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in tree.items()]  # JSON is YAML
    return "\n".join(["# Written by jvpgraph prepare. In your settings: base: and the path of this file.", *lines, ""])


def run_text(out: Path, encoder: Encoder, card: dict[str, Any], dtype: str) -> str:
    """A run to start from: adapters by rCM, or by DMD where there are prompts only, or a student of high noise."""
    objective = "{name: rcm}" if card["latents"]["field"] is not None else "{name: dmd}"
    high, last = (f"out/{out.resolve().name}{end}" for end in ends_of(encoder))
    batch, then, taught, steps = batch_of(card), "", "", ""
    attention = encoder.family.attention
    targets = f", targets: {json.dumps(attention)}" if attention else ""
    precision = "float32" if dtype == "float32" else "bfloat16"
    if (boundary := encoder.checkpoint.boundary) is not None:
        objective = of_phase(end=boundary, middle=(1 + boundary) / 2)
        then = f"\n#   jvpgraph train {out / RUN_LOW}              after it: the student of low noise"
        taught = f"""
teacher: # two networks, of which a block at a time is on the GPU
  model: {{options: {{dtype: {precision}}}}}
  offload: true"""
        steps = "steps: [1, 2], "
    return f"""\
# A run to start from, written by jvpgraph prepare for a {encoder.checkpoint.pipeline}. Change it, or copy it.
#   jvpgraph plan {out / RUN} --gpu h100        does it fit, how long does it take
#   jvpgraph train {out / RUN}                  after a stop, the same command goes on{then}
#   jvpgraph export {last} --format diffusers    or lora, or comfyui
# `jvpgraph train --help` has all settings.
base: {quoted((out / SETTINGS).resolve())} # checkpoint, data, guidance, decoder
out: {quoted(high)} # checkpoints, previews, log
model: {{options: {{dtype: {precision}}}}} # bfloat16: half the memory; float32: exact{taught}
student:
  lora: {{rank: 64, alpha: 64{targets}}} # without this line all weights are trained, which takes far more memory
  checkpoint_blocks: true # less memory, about a third more time
stages:
{stage_text(objective, batch)}
checkpoint: {{every: 250}}
log: {{preview_every: 250, preview_count: {min(4, card["samples"])}}}
sampling: {{{steps}batch: {batch}}} # made at a time
"""


def low_text(out: Path, encoder: Encoder, card: dict[str, Any], boundary: float) -> str:
    """The run of the student of low noise, after that of `run_text`."""
    high, low = (quoted(f"out/{out.resolve().name}{end}") for end in ends_of(encoder))
    objective = of_phase(start=boundary, middle=boundary * 5 / 7, earlier=high)
    return f"""\
# The student of low noise, from where that of {RUN} ends, which has to be trained first: docs/trainer.md, two students.
base: {RUN}
out: {low}
model: {{options: {{path: {quoted(encoder.checkpoint.path.resolve() / "transformer_2")}}}}}
stages:
{stage_text(objective, batch_of(card))}
sampling: {{steps: [2, 4]}} # of both students together
"""


def ends_of(encoder: Encoder) -> tuple[str, str]:
    """Of the names of the folders of two runs, the same where there is one."""
    return ("", "") if encoder.checkpoint.boundary is None else ("-high", "-low")


def quoted(path: Path | str) -> str:
    return json.dumps(str(path), ensure_ascii=False)


def batch_of(card: dict[str, Any]) -> int:
    """Samples per forward."""
    return int(min(1 if commonest(card)["frames"] > 1 else 4, card["samples"]))


def stage_text(objective: str, batch: int) -> str:
    guess = "the adapters' rates are a guess; of whole weights, rCM's are 2.0e-6 and 4.0e-7"
    return f"""\
  - steps: 2000
    batch: {batch} # samples per forward, over all processes
    accumulate: 8 # forwards per update
    objective: {objective}
    student: {{lr: 5.0e-5}} # {guess}
    fake: {{lr: 1.0e-5}}"""


def of_phase(*, middle: float, **ends: Any) -> str:
    """A phase of dmd in two steps: between rectified-flow times, the second step from `middle`."""
    given = {key: value if isinstance(value, str) else f"{radians(value):.7g}" for key, value in ends.items()}
    told = ", ".join(f"{key}: {value}" for key, value in given.items())
    return f"{{name: dmd, simulation_steps: 2, fixed_times: [{radians(middle):.7g}], {told}}}"


def commonest(card: dict[str, Any]) -> dict[str, Any]:
    """The bucket with the most samples."""
    found: dict[str, Any] = max(card["buckets"], key=lambda bucket: bucket["samples"])
    return found


def call_of(encoder: Encoder, card: dict[str, Any]) -> dict[str, Any]:
    """What the pipeline has to be called with, to sample as on this data: shape, tokens of text, what it is told."""
    bucket, constants = commonest(card), card["constants"]
    told: dict[str, Any] = {"height": bucket["height"], "width": bucket["width"], "use_resolution_binning": False}
    told |= dict.fromkeys(LENGTHS, encoder.length)
    if encoder.family.video:
        told |= dict.fromkeys(("num_frames", "frames"), bucket["frames"])
    if encoder.family.rate is not None:
        told[encoder.family.rate] = constants[encoder.family.rate]
    if "guidance" in constants:
        told["guidance_scale"] = constants["guidance"] / encoder.family.guidance_scale
    known = inspect.signature(encoder.pipe.__call__).parameters
    return {name: value for name, value in told.items() if name in known}


def shift_of(encoder: Encoder, latents: list[int]) -> float:
    """By which the pipeline's scheduler moves its steps towards noise, for latents [C, ..., h, w]."""
    config = encoder.pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return float(config.get("flow_shift") or config.get("shift") or 1.0)
    rule = getattr(sys.modules[type(encoder.pipe).__module__], "calculate_shift", usual_shift)  # CogView4's is its own
    names = inspect.signature(rule).parameters
    asked = {name: config.get(name.replace("_seq_len", "_image_seq_len")) for name in names}
    tokens = math.prod(latents[1:]) / encoder.patch**2
    mu = rule(tokens, **{name: value for name, value in asked.items() if value is not None})
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else float(mu)


def usual_shift(
    tokens: float,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Flux' rule."""
    return base_shift + (max_shift - base_shift) * (tokens - base_seq_len) / (max_seq_len - base_seq_len)
