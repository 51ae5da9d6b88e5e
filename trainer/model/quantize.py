"""Weights of a byte each, by torchao, for a network that is only asked, and the same below the adapters of others."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from jvpgraph.trainer.model.networks import share_frozen
from jvpgraph.trainer.model.student import kept_in_float32, shared
from jvpgraph.trainer.optional import torchao
from jvpgraph.trainer.trigflow import TrigFlow

CONFIGS = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}
SCALES = {"int8": 5, "float8": 4}  # bytes of scale and zero point for each row


def chosen(model: TrigFlow) -> dict[str, nn.Linear]:
    """The layers that `quantize` takes, by name."""
    layers = {name: module for name, module in model.net.named_modules() if isinstance(module, nn.Linear)}
    return {name: layer for name, layer in layers.items() if not kept_in_float32(model.net, name)}


def saved_bytes(model: TrigFlow, kind: str) -> int:
    """By how much `quantize` makes a network smaller."""
    weights = [layer.weight for layer in chosen(model).values()]
    return sum(w.nbytes - w.numel() - SCALES[kind] * len(w) for w in weights)


@torch.no_grad()
def quantize(model: TrigFlow, kind: str) -> TrigFlow:
    """The model itself; weights of its linear layers in int8 or float8, with a float32 scale for each row.

    Biases, norms, embeddings and convolutions stay, and so does what diffusers keeps in float32. Products are of the
    network's own dtype: a weight is widened before each.

    Raises:
        ValueError: torchao is not installed, or there are no linear layers.
    """

    layers = chosen(model)
    if not layers:
        raise ValueError(
            f"teacher.quantization={kind}: {type(model.net).__name__} has no linear layers, whose weights it is for: "
            "set it to null"
        )
    ao: Any = torchao("quantization", "teacher.quantization=null")
    ao.quantize_(model.net, getattr(ao, CONFIGS[kind])(), filter_fn=lambda _, name: name in layers)
    return model.requires_grad_(False)


def put_on_bytes(student: TrigFlow, teacher: TrigFlow, kind: str | None) -> None:
    """Lets the adapters of a LoRA student compute with its teacher's weights in bytes; None: with those as they are.
    The teacher keeps its own."""
    if kind is not None:
        share_frozen(student, quantize(copy.deepcopy(teacher, shared(teacher)), kind))
