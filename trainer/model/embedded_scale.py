"""The guidance scale as an input of networks that take none: `embed_scale`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from jvpgraph.trainer.batch import Condition
from jvpgraph.trainer.model.additions import EMBEDDED, TimeInput, add, added, fold
from jvpgraph.trainer.model.one_call import told
from jvpgraph.trainer.trigflow import Around, TrigFlow


class WithGuidance(Around):
    """The call of a network that was given its guidance scale: it has a condition `guidance` [B] from now on."""

    def __call__(self, net: nn.Module, x: Tensor, time: Tensor, cond: Condition, **second: Tensor) -> Tensor:
        rest = {name: value for name, value in cond.items() if name != "guidance"}
        if len(rest) == len(cond):
            raise ValueError(
                f"this {type(net).__name__} learnt more than one guidance scale, and needs the condition guidance [B]; "
                f"the batch has {', '.join(cond) or 'none'}"
            )
        with told(net.get_submodule(EMBEDDED), "value", cond["guidance"].float()):
            return self.call(net, x, time, rest, **second)


def embed_scale(model: TrigFlow, where: TimeInput | None = None) -> TrigFlow:
    """The model itself, which takes its guidance scale w as the condition `guidance` from now on.

    e(t)  becomes  e(t) + g(w)

    with an addition g, see additions.py. It is given w / 10 in the place of the network's time from 0 to 1. So scales
    from 1 to 10 lie where e, of which g is a copy, has learnt to tell times apart, and a tenth of a scale is 0.01 of
    the time: 10 rad of the fastest wave of most networks, 0.1 rad of those that turn a hundred times slower. LCM's 1000
    w, which first meets a layer without a past, is ten times as fast: its fastest waves turn more than once between
    scales that differ by 0.01.

    One that was given it already stays as it is.

    Args:
        where: of the time's embedding, for networks that are not in KNOWN.

    Raises:
        ValueError: it is not known where, or there is no such module, or none with a linear layer.
    """
    if EMBEDDED not in added(model.net):
        add(model.net, EMBEDDED, where or TimeInput(), times=0.1 * model.time_scale)
        model.call = WithGuidance(model.call)
    return model


def fix(net: Any, scale: float) -> None:
    """Makes a network one of its class again, for one guidance scale: g(w) is a vector then, and goes into e's bias.

    Raises:
        ValueError: e has no such bias.
    """
    try:
        fold(net, EMBEDDED, scale)
    except ValueError as error:
        raise ValueError(f"{error}\nUse --keep-scale, which leaves the scale an input.") from error
