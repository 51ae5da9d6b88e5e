"""A second time r for networks that know one: `add_second_time`.

    e(t)  becomes  e(t) + d(t - r)

e is the module that embeds the time, and d a copy of it whose last layer is zero: until that is trained the network is
its teacher bit for bit, whatever r. That is the form of the digits' DiT and of AceStep, and AnyFlow's with a gate of a
half, see trainer/model/anyflow.py. Without r it is t, and the network gives a velocity.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from jvpgraph.trainer.batch import Condition
from jvpgraph.trainer.model.one_call import told
from jvpgraph.trainer.trigflow import Call, TrigFlow

INTERVAL = "interval"  # the name of d in the network; not within e, which may be a Sequential
SAVED = "_second_time"  # in the config.json of a network of diffusers, which passes over what begins with _


@dataclass(frozen=True)
class SecondTime:
    """Where a network takes its time in; nothing need be said of those in KNOWN."""

    embedder: str | None = None  # dotted name of the module that gives the time's embedding [B, C]; null: known
    sinusoids: str | None = None  # of the module that makes the embedder's input from the time; null: it takes the time
    scale: float = 1.0  # the time that it is given, where the network is given 1

    def __post_init__(self) -> None:
        if self.embedder is None and (self.sinusoids, self.scale) != (None, 1.0):
            raise ValueError("sinusoids and scale are those of an embedder: name that too")


def below(parent: str, scale: float = 1.0) -> SecondTime:
    """As most embeddings of diffusers name their parts."""
    return SecondTime(f"{parent}.timestep_embedder", f"{parent}.time_proj", scale)


WAN = SecondTime("condition_embedder.time_embedder", "condition_embedder.timesteps_proj")
KNOWN = {
    "AuraFlowTransformer2DModel": SecondTime("time_step_proj", "time_step_embed"),
    "Flux2Transformer2DModel": below("time_guidance_embed", 1000.0),
    "FluxTransformer2DModel": below("time_text_embed", 1000.0),
    "HunyuanImageTransformer2DModel": below("time_guidance_embed"),
    "HunyuanVideo15Transformer3DModel": below("time_embed"),
    "HunyuanVideoTransformer3DModel": below("time_text_embed"),
    "LTXVideoTransformer3DModel": below("time_embed.emb"),
    "PixArtTransformer2DModel": below("adaln_single.emb"),
    "QwenImageTransformer2DModel": below("time_text_embed"),
    "SD3Transformer2DModel": below("time_text_embed"),
    "SanaTransformer2DModel": below("time_embed"),  # or in time_embed.emb, without a guidance scale
    "SanaVideoTransformer3DModel": below("time_embed"),
    "SkyReelsV2Transformer3DModel": WAN,
    "WanTransformer3DModel": WAN,
    "ZImageTransformer2DModel": SecondTime("t_embedder", scale=1000.0),
}


def takes_r(model: nn.Module) -> bool:
    """Whether a TrigFlow model, its dual, or one with guidance can be asked for an average velocity: called with r."""
    inner: Any = model
    while not isinstance(inner, TrigFlow):
        inner = inner.model
    own = getattr(inner.call, "takes_r", None)  # of an adapter
    return "time_r" in inspect.signature(inner.call).parameters if own is None else own


def add_second_time(model: TrigFlow, where: SecondTime | None = None) -> TrigFlow:
    """The model itself, which takes r from now on, and no r as r = t.

    A network that takes two times already stays as it is; one with a method `with_second_time` is left to that, which
    returns its call.

    Args:
        where: of the time's embedding, for networks that are not in KNOWN.

    Raises:
        ValueError: it is not known where, or there is no such module, or none with a linear layer.
    """
    net, own = model.net, getattr(model.net, "with_second_time", None)
    if own is not None:
        model.call = own()
    elif not takes_r(model):
        place = found(net, where or SecondTime())
        embedder = net.get_submodule(place.embedder or "")
        sinusoids = None if place.sinusoids is None else net.get_submodule(place.sinusoids)
        interval = Interval(embedder, sinusoids)
        net.add_module(INTERVAL, interval)
        embedder.interval = (interval,)  # type: ignore[assignment]  # hidden from what goes through its children
        embedder.register_forward_hook(add_interval)
        model.call = WithSecondTime(model.call, place)
    return model


def found(net: nn.Module, where: SecondTime) -> SecondTime:
    """The place in this network, all of whose modules it has. Raises ValueError."""
    names = dict(net.named_modules())
    if where.embedder is None:
        classes = [cls.__name__ for cls in type(net).__mro__]  # FSDP makes a subclass
        where = next((KNOWN[name] for name in classes if name in KNOWN), where)
        if f"{where.embedder}" not in names and where.embedder is not None:  # Sana's, PixArt's
            parent, _, last = where.embedder.rpartition(".")
            where = below(f"{parent}.emb", where.scale) if f"{parent}.emb.{last}" in names else where
    likely = [name for name in names if "time" in name and "block" not in name and name.count(".") < 3]
    do = f"Name the module that embeds its time: student.second_time={{embedder: NAME}}; likely ones: {likely[:8]}"
    if where.embedder is None:
        raise ValueError(f"student.second_time: it is not known where {type(net).__name__} takes its time in\n{do}")
    if hasattr(net, INTERVAL):
        raise ValueError(f"student.second_time: {type(net).__name__} has an `{INTERVAL}` of its own\nRename that.")
    for name in (where.embedder, where.sinusoids):
        if name is not None and name not in names:
            raise ValueError(f"student.second_time: {type(net).__name__} has no module {name}\n{do}")
    if not any(isinstance(module, nn.Linear) for module in names[where.embedder].modules()):
        raise ValueError(f"student.second_time: {where.embedder} has no linear layer, so it embeds no time\n{do}")
    return where


class Interval(nn.Module):
    """d: how far t and r are apart [B] -> what that adds to the time's embedding [B, C].

    Args:
        embedder: e, which is copied.
        sinusoids: what makes its input from a time, copied too; None: the embedder does.
    """

    length: Tensor | None = None  # t - r [B] of this call, float32; None: zero

    def __init__(self, embedder: nn.Module, sinusoids: nn.Module | None) -> None:
        super().__init__()
        self.sinusoids = copy.deepcopy(sinusoids)
        self.embedder = copy.deepcopy(embedder)
        last = [module for module in self.embedder.modules() if isinstance(module, nn.Linear)][-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, embedding: Tensor) -> Tensor:
        """What is added to a time's embedding [B, C]."""
        length = self.length
        if length is None:
            length = torch.zeros(len(embedding), dtype=torch.float32, device=embedding.device)
        if self.sinusoids is not None:
            length = self.sinusoids(length).to(next(self.embedder.parameters()).dtype)
        return self.embedder(length).to(embedding.dtype)


def add_interval(embedder: Any, _: Any, embedding: Tensor) -> Tensor:
    """A hook without a closure, so that copies of a network have their own."""
    if not isinstance(embedding, Tensor):
        raise TypeError(
            f"student.second_time: a {type(embedder).__name__} gives a {type(embedding).__name__}, not an embedding "
            "[B, C]: name the module within it that does"
        )
    (interval,) = embedder.interval
    total: Tensor = embedding + interval(embedding)
    return total


class WithSecondTime:
    """The call of a network that was given a second time."""

    def __init__(self, call: Call, where: SecondTime) -> None:
        self.call, self.where = call, where
        self.name = getattr(call, "name", None)  # of an adapter

    def __call__(
        self, net: nn.Module, x: Tensor, time: Tensor, cond: Condition, time_r: Tensor | None = None
    ) -> Tensor:
        if time_r is None:
            return self.call(net, x, time, cond)
        with told(net.get_submodule(INTERVAL), "length", self.where.scale * (time - time_r)):
            return self.call(net, x, time, cond)


def saved_with(model: TrigFlow, net: Any) -> Any:
    """The model's network, or one like it, which says in its config.json where it was given a second time."""
    if isinstance(model.call, WithSecondTime) and hasattr(net, "register_to_config"):
        net.register_to_config(**{SAVED: asdict(model.call.where)})
    return net


def without_complaint(cls: Any) -> Any:
    """A class of diffusers that loads what `saved_with` saved, and leaves the second time to `load_second_time`."""
    return type(cls.__name__, (cls,), {"_keys_to_ignore_on_load_unexpected": [rf"^{INTERVAL}\."]})


@torch.no_grad()
def load_second_time(model: TrigFlow, folder: Path) -> None:
    """Adds the second time that its network was saved with, and takes its weights from the folder's safetensors.

    Raises:
        ValueError: they are not there, or of another shape.
    """
    place: Any = getattr(model.net, "config", {}).get(SAVED)
    if place is None:
        return
    add_second_time(model, SecondTime(**place))
    wanted = {name: p for name, p in model.net.state_dict().items() if of_interval(name)}
    if all(value.is_meta for value in wanted.values()):
        return
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in wanted.keys() & set(tensors.keys()):
                wanted.pop(name).copy_(tensors.get_tensor(name))
    if wanted:
        raise ValueError(
            f"{folder}: config.json says that the network takes a second time, and {len(wanted)} of its tensors are "
            f"missing, such as {min(wanted)}\nExport it again; diffusers itself does not save them."
        )


def of_interval(parameter: str) -> bool:
    """Whether a parameter, by its dotted name, belongs to what `add_second_time` added."""
    return INTERVAL in parameter.split(".")
