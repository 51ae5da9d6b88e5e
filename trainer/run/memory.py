"""Which settings do not go with each other, with a layout or with what is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.optional import torchao


def clashes(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[str]:
    """A sentence or two on each: why, and what to do.

    Args:
        sizes: how often each setting of `parallel` splits.
    """
    away = [name for name in ("teacher", "fake_score") if getattr(config, name).offload]
    kinds = {
        f"stages.{i}.{name}.kind": settings.kind
        for i, stage in enumerate(config.stages)
        for name, settings, there in (
            ("student", stage.student, True),
            ("fake", stage.fake, stage.objective.fake_score is not None),
            ("critic", stage.critic, stage.objective.critic is not None),
        )
        if there
    }
    bytewise = [key for key, kind in kinds.items() if kind == "adamw_8bit"]
    quantization = config.teacher.quantization
    splits = [name for name in ("dp_shard", "cp_ulysses", "cp_ring", "tp") if sizes[name] > 1]

    for i, stage in enumerate(config.stages):
        if not stage.objective.through_tangent:
            continue
        what = f"stages.{i}.objective: the gradient of {stage.objective.name} goes through the tangent, which needs "
        if config.student.backend == "op_by_op":
            yield what + "a graph. Set student.backend to inductor or eager"
        if config.bytes_below_adapters is not None:
            yield what + "plain weights. Set teacher.quantization to null, or train without student.lora"
        if several := [name for name, size in sizes.items() if size > 1]:
            yield (
                what
                + f"one graph in one process, which parallel.{several[0]} takes apart. Set it to 1, or take another "
                "method"
            )
    for name in away:
        if config.student.lora is not None and (name == "fake_score" or config.teacher.model is None):
            yield (
                f"{name}.offload: with student.lora, teacher, student and fake score compute with the same weights, "
                f"which never rest. Set {name}.offload to false"
            )
        if config.student.compile:
            yield (
                f"{name}.offload: what fetches the weights is not compiled. Set student.compile to false, or "
                f"{name}.offload"
            )
        if sizes["tp"] > 1:
            yield f"{name}.offload: not with parallel.tp, whose layers FSDP2 does not gather. Use dp_shard instead"
    if quantization is not None and splits:
        yield (
            f"teacher.quantization: {quantization} weights cannot be split, and parallel.{splits[0]} splits them. "
            "Use dp_replicate alone; or set teacher.quantization to null, where each process has but a part of it"
        )
    if bytewise and sizes["tp"] > 1:
        yield f"{bytewise[0]}: adamw_8bit has scales for whole rows, which parallel.tp splits. Set it to adamw"
    if bytewise and config.student.dtype == "float64":
        yield f"{bytewise[0]}: adamw_8bit steps in float32. Set it to adamw, or student.dtype to float32 or bfloat16"
    for wanted, module, without in (
        (bytewise, "optim", f"{', '.join(bytewise)} to adamw"),
        (quantization, "quantization", "teacher.quantization to null"),
    ):
        if wanted:
            try:
                torchao(module, without)
            except ValueError as error:
                yield str(error)
