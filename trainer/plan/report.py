"""A plan in words: what is held, whether it fits, how long it takes, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.plan.machines import GPUS, LINK, USABLE
from jvpgraph.trainer.plan.plan import Plan


def report(plan: Plan, config: RunConfig, name: str, share: float) -> str:
    """Of one stage on GPUs of GPUS, of whose FLOPs this share is used."""
    gpu, stage = GPUS[name], config.stages[plan.index]
    whole, trained = plan.parameters
    seconds = plan.seconds(gpu, share)
    unit = "GiB" if plan.peak >= 2**29 else "MiB"
    sized = partial(amount, unit=unit)
    lines = [
        f"stage {plan.index}: {stage.objective.name}, {plan.samples} samples per update, "
        f"{plan.processes} x {name} ({gpu.memory / 2**30:.0f} GiB)",
        f"  parameters        {billions(whole)}, of which {billions(trained)} are trained",
        f"  memory of each process, {unit}",
        *(f"    {what:<30}{sized(size):>8}" for what, size in rows(plan)),
        f"    {'most at once':<30}{sized(plan.peak):>8}  ({max(plan.moments, key=plan.moments.__getitem__)})",
        *on_the_cpu(plan),
        f"  FLOPs per update  {plan.flops:.3g} in each process, recomputation included",
        f"  time              {duration(seconds)} per update, {duration(seconds * plan.steps)} for {plan.steps} "
        f"updates, at {share:.0%} of {gpu.peak(plan.dtype) / 1e12:.0f} TFLOPs/s",
    ]
    usable = USABLE * gpu.memory
    if plan.fits(gpu):
        lines.append(f"  fits: {amount(usable - plan.peak)} GiB to spare of the {amount(usable)} that can be used")
    else:
        lines.append(
            f"  does not fit: {amount(plan.peak - usable)} GiB more than the {amount(usable)} that can be used"
        )
        lines += [f"    try {text}" for text in advice(plan, config)]
    return "\n".join(lines)


def on_the_cpu(plan: Plan) -> Iterator[str]:
    if plan.host:
        yield "  on the CPU, GiB for each process"
        rows = {**plan.host, "gradients and a step there": plan.host_at_work}
        yield from (f"    {what:<30}{amount(size):>8}" for what, size in rows.items() if size)
    if plan.moved:
        price = f"{duration(plan.moved / LINK)} at {LINK / 1e9:.0f} GB/s"
        yield f"  moved             {amount(plan.moved)} GiB per update between CPU and GPU: {price}"


def rows(plan: Plan) -> Iterator[tuple[str, float]]:
    yield from ((what, size) for what, size in plan.resident.items() if size)
    yield "gradients", plan.gradients
    yield "activations for the backward", plan.kept
    yield "tangents, and all else at work", plan.at_work


def advice(plan: Plan, config: RunConfig) -> Iterator[str]:
    """What would need less, beginning with what costs the least."""
    held, stage = sum(plan.resident.values()), config.stages[plan.index]
    if not config.student.checkpoint_blocks and plan.kept > 0.1 * plan.peak:
        yield "student.checkpoint_blocks=true: activations of blocks are computed again instead of kept"
    if stage.batch > plan.processes:
        less = f"stages.{plan.index}.batch={stage.batch // 2} stages.{plan.index}.accumulate={stage.accumulate * 2}"
        yield f"{less}: the same samples per update in twice as many passes"
    if held > 0.3 * plan.peak and len(config.ema.sigma_rel) > 1:
        yield f"ema.sigma_rel='[{config.ema.sigma_rel[0]:g}]': one average instead of {len(config.ema.sigma_rel)}"
    yield from smaller(plan, config)
    if held + plan.gradients > 0.3 * plan.peak:
        if config.student.lora is None:
            yield "student.lora='{rank: 64}': adapters are trained, on the teacher's own weights"
        yield f"more GPUs: parallel.dp_shard=-1 and --gpus {2 * plan.processes}, which split all that is held"
    if plan.kept + plan.at_work > 0.5 * plan.peak and stage.batch <= plan.processes:
        yield f"parallel.cp_ulysses=2 and --gpus {2 * plan.processes}: the tokens of a sample are split"


def smaller(plan: Plan, config: RunConfig) -> Iterator[str]:
    """Other places and smaller numbers for what is held, where that is a good part of it."""
    parallel, stage, much = config.parallel, config.stages[plan.index], 0.05 * plan.peak
    split = plan.processes > parallel.dp_replicate
    if plan.resident.get("averages", 0) > much:
        yield f"ema.device=cpu: {amount(plan.resident['averages'])} GiB of averages off the GPU, copied once per update"
    for name, key in (("student", "student"), ("fake score", "fake")):
        kind = getattr(stage, key).kind
        if plan.resident.get(f"optimiser of the {name}", 0) > much and kind == "adamw" and parallel.tp == 1:
            yield f"stages.{plan.index}.{key}.kind=adamw_8bit: moments of a byte instead of four (torchao)"
    if config.student.lora is not None or config.student.compile or parallel.tp > 1:
        return
    for name, key in (("fake score", "fake_score"), ("teacher", "teacher")):
        held = sum(size for what, size in plan.resident.items() if name in what)
        if held > much:
            yield f"{key}.offload=true: {amount(held)} GiB rest on the CPU, and are copied when they are used"
    if plan.resident.get("teacher", 0) > much and config.teacher.quantization is None and not split:
        yield "teacher.quantization=int8: a byte for each weight of its linear layers (torchao), rounded to that"


def amount(size: float, unit: str = "GiB") -> str:
    """In GiB or MiB."""
    value = size / (2**30 if unit == "GiB" else 2**20)
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def billions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count / 1e6:.2f} million"


def duration(seconds: float) -> str:
    """Of the largest unit that leaves more than one."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} seconds"
