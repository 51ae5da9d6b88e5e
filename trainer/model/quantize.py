"""Weights of a byte each, by torchao, for a network that is only asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from jvpgraph.trainer.model.student import kept_in_float32
from jvpgraph.trainer.optional import torchao
from jvpgraph.trainer.trigflow import TrigFlow

CONFIGS = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}


@torch.no_grad()
def quantize(model: TrigFlow, kind: str) -> TrigFlow:
    """The model itself; weights of its linear layers in int8 or float8, with a float32 scale for each row.

    Biases, norms, embeddings and convolutions stay, and so does what diffusers keeps in float32. Products are of the
    network's own dtype: a weight is widened before each.

    Raises:
        ValueError: torchao is not installed, or there are no linear layers.
    """

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not kept_in_float32(model.net, name)

    if not any(chosen(module, name) for name, module in model.net.named_modules()):
        raise ValueError(
            f"teacher.quantization={kind}: {type(model.net).__name__} has no linear layers, whose weights it is for: "
            "set it to null"
        )
    ao: Any = torchao("quantization", "teacher.quantization=null")
    ao.quantize_(model.net, getattr(ao, CONFIGS[kind])(), filter_fn=chosen)
    return model.requires_grad_(False)
