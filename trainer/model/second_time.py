"""A second time r for networks that know one: `add_second_time`.

    e(t)  becomes  e(t) + d(t - r)

with an addition d, see additions.py. That is the form of the digits' DiT and of AceStep, and AnyFlow's with a gate of a
half, see anyflow.py. Without r it is t, and the network gives a velocity.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Condition
from jvpgraph.trainer.model.additions import INTERVAL, TimeInput, add
from jvpgraph.trainer.model.one_call import told
from jvpgraph.trainer.trigflow import Around, Call, TrigFlow


def takes_r(model: nn.Module) -> bool:
    """Whether a TrigFlow model, its dual, or one with guidance can be asked for an average velocity: called with r."""
    inner: Any = model
    while not isinstance(inner, TrigFlow):
        inner = inner.model
    own = getattr(inner.call, "takes_r", None)  # of an adapter
    return "time_r" in inspect.signature(inner.call).parameters if own is None else own


def add_second_time(model: TrigFlow, where: TimeInput | None = None) -> TrigFlow:
    """The model itself, which takes r from now on, and no r as r = t.

    A network that takes two times already stays as it is; one with a method `with_second_time` is left to that, which
    returns its call.

    Args:
        where: of the time's embedding, for networks that are not in KNOWN.

    Raises:
        ValueError: it is not known where, or there is no such module, or none with a linear layer.
    """
    own: Any = getattr(model.net, "with_second_time", None)
    if own is not None:
        model.call = around(model.call, own())
    elif not takes_r(model):
        add(model.net, INTERVAL, where or TimeInput(), absent=0.0)
        model.call = WithSecondTime(model.call)
    return model


def around(call: Call, innermost: Call) -> Call:
    """What is around a network's call, around another one."""
    if not isinstance(call, Around):
        return innermost
    again = copy.copy(call)
    Around.__init__(again, around(call.call, innermost))
    return again


class WithSecondTime:
    """The call of a network that was given a second time."""

    takes_r = True

    def __init__(self, call: Call) -> None:
        self.call = call
        self.name = getattr(call, "name", None)  # of an adapter

    def __call__(
        self, net: nn.Module, x: Tensor, time: Tensor, cond: Condition, time_r: Tensor | None = None
    ) -> Tensor:
        apart = torch.zeros_like(time) if time_r is None else time - time_r
        with told(net.get_submodule(INTERVAL), "value", apart):
            return self.call(net, x, time, cond)
