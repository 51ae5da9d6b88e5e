"""Students: trainable copies of a teacher, whole or as low-rank adapters, with activation checkpointing if asked."""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from jvpgraph.trainer.model.additions import EMBEDDED, INTERVAL, TimeInput, added, of_addition
from jvpgraph.trainer.model.embedded_scale import embed_scale
from jvpgraph.trainer.model.parts import in_bytes, widened
from jvpgraph.trainer.model.second_time import add_second_time
from jvpgraph.trainer.ranges import positive
from jvpgraph.trainer.trigflow import TrigFlow


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters W + (alpha / rank) B A on linear layers (Hu et al. 2021), trained in place of W."""

    rank: int = 64  # columns of A and B
    alpha: float = 64.0  # the update is scaled by alpha / rank
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # last parts of dotted names; diffusers' attention

    def __post_init__(self) -> None:
        positive(self, "rank", "alpha")


def make_student(
    teacher: TrigFlow,
    *,
    dtype: str | None,
    lora: LoRA | None,
    checkpoint_blocks: bool,
    second_time: TimeInput | None = None,
    scale: TimeInput | None = None,
) -> TrigFlow:
    """A trainable copy of `teacher`, in its mode (training or evaluation) and on its devices.

    Args:
        teacher: not changed; but a LoRA student shares its parameters, which are frozen by that.
        dtype: of the parameters, such as "bfloat16"; None keeps each as it is. What the model's class lists in
            `_keep_in_fp32_modules` (diffusers) is not made narrower than float32. Buffers keep their dtype: among
            them are frequencies of time embeddings.
        lora: train adapters only. They are float32 and start as the identity; all else is shared with the teacher,
            so that the student costs no more than its adapters.
        checkpoint_blocks: compute the activations of repeated blocks again in the backward instead of keeping them.
            Names in the state_dict stay. jvpgraph.transform captures it, and recomputes no tangent.
        second_time, scale: let it take a second time, and its guidance scale; what is new is trained whole beside
            adapters.

    Raises:
        ValueError: no such dtype; a LoRA student of another dtype than its teacher; targets that match no linear
            layer; no repeated blocks; or no place for what is to be added.
        ModuleNotFoundError: LoRA without peft.
    """
    new = [name for name, place in ((INTERVAL, second_time), (EMBEDDED, scale)) if place is not None]

    def with_additions(student: TrigFlow) -> TrigFlow:
        if second_time is not None:
            add_second_time(student, second_time)
        if scale is not None:
            embed_scale(student, scale)
        return student

    if lora is None:
        student = with_additions(copy.deepcopy(teacher))
        if dtype is not None:
            _cast_parameters(student.net, _dtype(dtype))
        for parameter in student.parameters():
            parameter.requires_grad_(parameter.dtype.is_floating_point)
    else:
        if dtype is not None and {_dtype(dtype)} != {p.dtype for p in teacher.net.parameters()}:
            raise ValueError(
                f"a LoRA student shares its teacher's weights and so their dtype, which is not {dtype} throughout: "
                "pass dtype=None, or convert the teacher"
            )
        # a network may have its second time already, silent: that is the student's own from now on
        student = with_additions(copy.deepcopy(teacher, shared(teacher, but=new)))
        _add_adapters(student, lora, whole=new)
    if checkpoint_blocks:
        _checkpoint(student.net)
    return student


def merged(student: TrigFlow) -> nn.Module:
    """The student's network for export: adapters added to the weights below them, no checkpointing, none in bytes.

    Weights that have no adapter are shared with the student (and its teacher), none is changed. The sums are made in
    float32 or wider and rounded to the dtype of the weights.
    """
    net: nn.Module = copy.deepcopy(student.net, shared(student.net))
    for module in net.modules():
        if isinstance(module, CheckpointedBlock):
            module.__class__ = module.plain_class  # type: ignore[assignment]
    for name, layer in adapted_layers(net):
        base, weight = layer.base_layer, layer.base_layer.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.no_grad():
            total = widened(weight).to(wide) + sum(layer.get_delta_weight(a).to(wide) for a in layer.active_adapters)
        base.weight = nn.Parameter(total.to(weight.dtype), requires_grad=weight.requires_grad)
        net.set_submodule(name, base)
    for module in net.modules():
        if isinstance(module, nn.Linear) and in_bytes(module.weight):
            module.weight = nn.Parameter(widened(module.weight), requires_grad=False)
    vars(net).pop("peft_config", None)
    return net


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"there is no floating dtype {name!r}: choose float32, bfloat16, float16 or float64")
    return dtype


def shared(module: nn.Module, but: Sequence[str] = ()) -> dict[int, Any]:
    """A memo with which copy.deepcopy keeps parameters and buffers, those of some additions aside."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {id(tensor): tensor for name, tensor in named if not of_addition(name, but)}


def kept_in_float32(net: nn.Module, parameter: str) -> bool:
    """Whether diffusers keeps this parameter in float32 when the network is loaded in a narrower dtype.

    An addition is kept where what it is a copy of is kept.
    """
    if (addition := added(net).get(parameter.partition(".")[0])) is not None:
        parameter = f"{addition.place.embedder}.{parameter}"
    kept = getattr(net, "_keep_in_fp32_modules", None) or ()
    return any(part in parameter.split(".") for part in kept)


def _cast_parameters(net: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in net.named_parameters():
        if not parameter.dtype.is_floating_point:
            continue
        wide = kept_in_float32(net, name)
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32) if wide else dtype)


def _add_adapters(student: TrigFlow, lora: LoRA, *, whole: Sequence[str]) -> None:
    """`whole`: additions that are trained as they are."""
    net = student.net
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    linear = [name for name in linear if not of_addition(name, whole)]
    matches = {target: [n for n in linear if f".{n}".endswith(f".{target}")] for target in lora.targets}
    unmatched = [target for target, found in matches.items() if not found]
    if unmatched or not matches:
        shapes = sorted({re.sub(r"\.\d+\.", ".*.", f".{name}.").strip(".") for name in linear})
        raise ValueError(
            f"LoRA targets that match no linear layer of {type(net).__name__}: {', '.join(unmatched) or '(none given)'}"
            "\n  Its linear layers are\n    " + "\n    ".join(shapes)
        )
    try:
        peft = importlib.import_module("peft")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("LoRA students need peft: pip install peft") from error
    names = sorted({name for found in matches.values() for name in found})
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules="|".join(map(re.escape, names)),  # a pattern, for names in a list match the ends of others too
    )
    own = INTERVAL in whole and hasattr(net, "with_second_time")
    if own and not any(of_addition(name, [INTERVAL]) for name, _ in net.named_parameters()):
        raise ValueError(
            f"student.lora: {type(net).__name__} brings its second time itself, and adapters would be all that is "
            f"trained: call the module that embeds t - r `{INTERVAL}`, which is trained whole; or train without lora"
        )
    net.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        # A fixed seed: all ranks of a sharded or replicated student start from the same adapters.
        torch.manual_seed(0)
        peft.inject_adapter_in_model(settings, net)
    for _, layer in adapted_layers(net):
        for adapters in (layer.lora_A, layer.lora_B):
            adapters.float()
            adapters.requires_grad_(True)
    for name, parameter in net.named_parameters():
        if of_addition(name, whole):
            parameter.requires_grad_(True)  # peft takes everything else for frozen


def adapted_layers(net: nn.Module) -> list[tuple[str, Any]]:
    """Linear layers with adapters, by name; a list, so that they may be replaced."""
    return [(name, m) for name, m in net.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


class CheckpointedBlock(nn.Module):
    """Marks classes made by `checkpointed`."""

    plain_class: type[nn.Module]


@functools.cache
def checkpointed(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward is checkpointed.

    Giving a module another class, as PyTorch's fully_shard does, leaves its names, copies and hooks alone; a wrapper
    would be a new level in every name, and a replaced `forward` attribute would stay bound to the original in copies.
    """

    plain_forward = plain.forward  # Dynamo knows functions better than attributes of classes

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain_forward(self, *args, **kwargs)
        return checkpoint(functools.partial(plain_forward, self), *args, use_reentrant=False, **kwargs)

    # The plain class comes first: a mixin's methods must not hide its own.
    return type(plain.__name__, (plain, CheckpointedBlock), {"forward": forward, "plain_class": plain})


def _checkpoint(net: nn.Module) -> None:
    blocks = list(repeated_blocks(net))
    if not blocks:
        raise ValueError(
            f"checkpoint_blocks: {type(net).__name__} has no nn.ModuleList of blocks of one class; "
            "set checkpoint_blocks=False, and call torch.utils.checkpoint in the model where it pays"
        )
    for block in blocks:
        block.__class__ = checkpointed(type(block))  # type: ignore[arg-type]


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Outermost children of ModuleLists with one class throughout that are made of several modules."""
    for blocks in repeated_lists(module):
        yield from blocks


def repeated_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists of `repeated_blocks`."""
    for child in module.children():
        parts = list(child.children()) if isinstance(child, nn.ModuleList) else []
        blocks = [part for part in parts if not isinstance(part, nn.ModuleList) and any(part.children())]
        if parts and len(blocks) == len(parts) and len({type(part) for part in parts}) == 1:
            assert isinstance(child, nn.ModuleList)
            yield child
        else:
            yield from repeated_lists(child)
