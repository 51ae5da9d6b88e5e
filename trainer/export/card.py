"""README.md of an export: how it is loaded and called, what it was made from, how good it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from jvpgraph.trainer import settings
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.export.task import Task
from jvpgraph.trainer.model.additions import EMBEDDED, INTERVAL, added
from jvpgraph.trainer.model.schedulers import own_file

Kind = Literal["pipeline", "network", "plain", "lora", "comfyui"]


def write_card(task: Task, out: Path, kind: Kind, notes: str = "") -> None:
    """Writes README.md. `notes`: what the format has to say about itself, a paragraph."""
    library = "\nlibrary_name: diffusers" if task.from_diffusers else ""
    parts = [
        f"---{library}\n# license: yours to fill in; that of the teacher binds its students too\n---",
        f"# {task.folder.resolve().name}",
        f"A {type(task.net).__name__} distilled with jvpgraph: step {task.run.step} of a run of "
        + ", then ".join(stage.objective.name for stage in task.run.config.stages[: task.run.stage + 1])
        + ".",
        notes,
        task.about_bytes,
        f"Its guidance scale is {task.fixed_scale:g}, of those that it learnt." if task.fixed_scale else "",
        task.about_part,
        "## Use",
        USES[kind](task),
        times_of(task) if task.run.sampler == "consistency" and task.whole else "",
        evaluation_of(task),
        *(
            f"## Settings{whose}\n\n```yaml\n{settings.text(config).strip()}\n```"
            for whose, config in configs(task).items()
        ),
    ]
    (out / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def configs(task: Task) -> dict[str, RunConfig]:
    """The settings of the run, and of those before it that its samples go through, by the end of their heading."""
    found = {"": task.run.config}
    return found | {f" of {part.folders[-1]}": part.config for part in task.run.parts if part.folders}


# ---------------------------------------------------------------- code that loads it; `.` is the folder of the card


def use_pipeline(task: Task) -> str:
    needs_trust = own_file(task.scheduler) is not None if task.own_scheduler else False
    trust = ", trust_remote_code=True" if needs_trust else ""
    code = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        *(["from PIL import Image"] if task.first_frame else []),
        "",
        f'pipe = DiffusionPipeline.from_pretrained("."{trust})',
        "torch.manual_seed(0)  # schedulers that add noise take it from here",
        f'output = pipe(prompt="a prompt", {first_frame(task)}{call_of(task.arguments())})[0]',
    ]
    return python(code) + (f"\n\n{NEW_NOISE if task.by_jumps else OWN_TIMES} {OWN_CLASS}" if needs_trust else "")


def use_network(task: Task) -> str:
    cls = type(task.net).__name__
    if not task.from_diffusers:
        return f"`{cls}` reads this folder as its `save_pretrained` wrote it."
    code = [f"from diffusers import {cls}", "", f'net = {cls}.from_pretrained(".")']
    if task.by_jumps:
        return python(code) + f"\n\n{JUMPS} with the `{type(task.scheduler).__name__}` in `scheduler/`."
    if given := added(task.net):
        code = [
            "from jvpgraph.trainer.adapters import diffusers_model",
            "",
            'model = diffusers_model(".")',
            "F = model(x_t, t, conditions, r)" if INTERVAL in given else "F = model(x_t, t, conditions)",
        ]
        about = [UNKNOWN, AVERAGE if INTERVAL in given else F, SCALE if EMBEDDED in given else ""]
        return f"{python(code)}\n\n{' '.join(filter(None, about))}"
    if task.fits and own_file(task.scheduler) is None:
        code.insert(0, "from diffusers import FlowMatchLCMScheduler")
        code += ['scheduler = FlowMatchLCMScheduler.from_pretrained(".", subfolder="scheduler")']
    return python(code) + "\n\nBoth belong into the teacher's pipeline, in the place of its own." * task.fits


def use_plain(task: Task) -> str:
    plug = task.run.config.model
    source, _, name = plug.load.rpartition(":")
    module = source if plug.file is None else plug.file.stem
    options = ", ".join(f"{key}={value!r}" for key, value in plug.options.items())
    load = ["from safetensors.torch import load_model", f"from {module} import {name.partition('.')[0]}"]
    make = [f"model = {name}({options})"]
    about = f"F is `model(x_t, t, conditions)`. {F}"
    given = added(task.net)
    if given:
        load.insert(0, "from jvpgraph.trainer.model.additions import TimeInput")
    if INTERVAL in given:
        load.insert(1, "from jvpgraph.trainer.model.second_time import add_second_time")
        make.append(f"add_second_time(model, {given[INTERVAL].place})")
        about = f"F is `model(x_t, t, conditions, r)`. {AVERAGE}"
    if EMBEDDED in given:
        load.insert(1, "from jvpgraph.trainer.model.embedded_scale import embed_scale")
        make.append(f"embed_scale(model, {given[EMBEDDED].place})")
        about = f"{about} {SCALE}"
    code = [*load, "", *make, 'load_model(model.net, "model.safetensors")']
    return f"{python(code)}\n\n{about}"


def use_lora(task: Task) -> str:
    code = [
        "import torch",
        "from diffusers import DiffusionPipeline, FlowMatchLCMScheduler",
        *(["from PIL import Image"] if task.pipeline and task.first_frame else []),
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{task.pipeline or "the teacher"}")',
        f'pipe.load_lora_weights("."{", load_into_transformer_2=True" if task.run.parts[0].folders else ""})',
    ]
    if task.run.parts[0].folders:
        code.append(f"pipe.register_to_config(boundary_ratio={task.boundary})  # where the students meet")
    if task.fits and own_file(task.scheduler) is None:
        code.append('pipe.scheduler = FlowMatchLCMScheduler.from_pretrained(".", subfolder="scheduler")')
    elif task.fits:
        code += [
            'sys.path.insert(0, "scheduler")',
            f"from few_step_scheduler import {type(task.scheduler).__name__}",
            f'pipe.scheduler = {type(task.scheduler).__name__}.from_pretrained("scheduler")',
        ]
        code.insert(0, "import sys")
    arguments = f"num_inference_steps={task.count}"
    if task.pipeline:
        arguments = first_frame(task) + call_of(task.arguments())
    return python([*code, "torch.manual_seed(0)", f'output = pipe(prompt="a prompt", {arguments})[0]'])


def use_comfyui(task: Task) -> str:
    levels = ", ".join(f"{level:.4f}" for level in task.levels) if task.fits else ""
    sampler = f" Sampler `lcm`, sigmas by hand: `{levels}` (with no shift of the model's)." if levels else ""
    return f"Put the file into `models/diffusion_models` and load it with Load Diffusion Model. cfg 1.0.{sampler}"


USES = {
    "pipeline": use_pipeline,
    "network": use_network,
    "plain": use_plain,
    "lora": use_lora,
    "comfyui": use_comfyui,
}

OWN_TIMES = (
    "The times of this student are not among those that diffusers' own schedulers can be told to use. Exported without "
    "`--times run` it needs no other."
)
NEW_NOISE = (
    "diffusers' own scheduler jumps from pure noise and along the flow, and this run's samples have "
    "`sampling.gamma` or `sampling.sigma_max`."
)
OWN_CLASS = (
    "The scheduler is the class in `scheduler/`, a few lines, which diffusers runs with `trust_remote_code=True` only."
)


JUMPS = (
    "It takes two times, and `AnyFlowPipeline` samples it by jumps from one to the next, in as many steps as it is "
    "asked for,"
)
UNKNOWN = "It takes what diffusers' own class does not know: loaded by that it would give something else."
F = "x0 = cos(t) x_t - sin(t) F, with t in radians of TrigFlow."
AVERAGE = "x_r = cos(t - r) x_t - sin(t - r) F, with t and r in radians of TrigFlow; no r is r = t, the velocity."
SCALE = "Its guidance scale is the condition `guidance` [B]."


def python(code: list[str]) -> str:
    return "\n".join(["```python", *code, "```"])


def first_frame(task: Task) -> str:
    """The argument with the picture that a video begins with."""
    return 'image=Image.open("first.png"), ' if task.first_frame else ""


def call_of(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


# ---------------------------------------------------------------- what is known about it


def times_of(task: Task) -> str:
    radians = ", ".join(f"{time:.4f}" for time in task.times)
    text = f"## Times\n\n{task.count} steps, at t = {radians} radians of TrigFlow"
    if task.fits:
        text += f" (sigmas {', '.join(f'{level:.4f}' for level in task.levels[:-1])} of the rectified flow)"
    own = ", ".join(f"{time:.4f}" for time in task.run_times)
    changed = f" The run itself was previewed and evaluated at {own}." if task.times != task.run_times else ""
    return f"{text}; `sampling.json` has those of the run for other numbers of steps.{changed}"


def evaluation_of(task: Task) -> str:
    """The figures of `jvpgraph evaluate`, if they are there."""
    file = task.folder / "evaluation.json"
    if not file.is_file():
        return ""
    report = json.loads(file.read_text())
    names = [name for name, value in next(iter(report["samplers"].values()))[0].items() if isinstance(value, float)]
    rows = [f"| sampler | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for sampler, seeds in report["samplers"].items():
        means = (sum(seed[name] for seed in seeds) / len(seeds) for name in names)
        rows.append(f"| {sampler} | {' | '.join(f'{mean:.4g}' for mean in means)} |")
    about = f"Means over {len(report['seeds'])} seeds, at step {report['step']}."
    return "\n".join(["## Evaluation", "", about, "", *rows])
