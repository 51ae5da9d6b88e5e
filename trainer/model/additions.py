"""What is added to a network's embedding of the time, for numbers that it does not know: an interval and a scale.

    e(t)  becomes  e(t) + d(t - r) + g(w)

e is the module that embeds the time, and d (second_time.py) and g (embedded_scale.py) are copies of it whose last layer
is zero: until they are trained the network is its teacher bit for bit, whatever r and w.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

INTERVAL = "interval"  # the name of d in the network; not within e, which may be a Sequential
EMBEDDED = "guidance_scale"  # of g
NAMES = (INTERVAL, EMBEDDED)
SETTINGS = {INTERVAL: "student.second_time", EMBEDDED: "student.embed_scale"}


@dataclass(frozen=True)
class TimeInput:
    """Where a network takes its time in; nothing need be said of those in KNOWN."""

    embedder: str | None = None  # dotted name of the module that gives the time's embedding [B, C]; null: known
    sinusoids: str | None = None  # of the module that makes the embedder's input from the time; null: it takes the time
    scale: float = 1.0  # the time that it is given, where the network is given 1

    def __post_init__(self) -> None:
        if self.embedder is None and (self.sinusoids, self.scale) != (None, 1.0):
            raise ValueError("sinusoids and scale are those of an embedder: name that too")


def below(parent: str, scale: float = 1.0) -> TimeInput:
    """As most embeddings of diffusers name their parts."""
    return TimeInput(f"{parent}.timestep_embedder", f"{parent}.time_proj", scale)


WAN = TimeInput("condition_embedder.time_embedder", "condition_embedder.timesteps_proj")
KNOWN = {
    "AuraFlowTransformer2DModel": TimeInput("time_step_proj", "time_step_embed"),
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
    "ZImageTransformer2DModel": TimeInput("t_embedder", scale=1000.0),
}


class Addition(nn.Module):
    """d or g: a number per sample [B] -> what that adds to the time's embedding [B, C].

    Args:
        embedder: e, which is copied.
        sinusoids: what makes its input from a time, copied too; None: the embedder does.
        place: where both were found.
        unit: the time that they are given for the number 1.
        absent: the number of a call that is told none; None: each has to be.
    """

    value: Tensor | None = None  # the numbers [B] of this call, float32

    def __init__(
        self,
        embedder: nn.Module,
        sinusoids: nn.Module | None,
        place: TimeInput,
        unit: float,
        absent: float | None,
    ) -> None:
        super().__init__()
        self.place, self.unit, self.absent = place, unit, absent
        self.sinusoids = copy.deepcopy(sinusoids)
        others: Any = getattr(embedder, "additions", None)
        self.embedder = copy.deepcopy(embedder, {id(others): ()} if others else None)  # alone
        for parameter in last_linear(self.embedder).parameters():
            nn.init.zeros_(parameter)

    def forward(self, embedding: Tensor) -> Tensor:
        """What is added to a time's embedding [B, C]. Raises ValueError if it was not told a number and needs one."""
        value = self.value
        if value is None:
            if in_backward():
                raise ValueError(
                    f"{self.place.embedder} is computed again in the backward, when its number is no longer there\n"
                    "Leave the module that holds it out of activation checkpointing (student.checkpoint_blocks, or "
                    "the network's own)."
                )
            if self.absent is None:
                raise ValueError(f"{self.place.embedder} is added to, and its network is called without the number")
            value = torch.full((len(embedding),), self.absent, dtype=torch.float32, device=embedding.device)
        return self.of(value).to(embedding.dtype)

    def of(self, value: Tensor) -> Tensor:
        """[B], float32 -> [B, C]."""
        return self.embedder(self.input_of(value))

    def input_of(self, value: Tensor) -> Tensor:
        """What the embedder makes its embedding from."""
        time = self.unit * value
        if self.sinusoids is None:
            return time
        waves: Tensor = self.sinusoids(time)
        return waves.to(next(self.embedder.parameters()).dtype)


def add(net: nn.Module, name: str, where: TimeInput, *, times: float = 1.0, absent: float | None = None) -> None:
    """Gives a network an addition.

    Args:
        times: the network's own time for the number 1.
        absent: as Addition has it.

    Raises:
        ValueError: there is no place for it.
    """
    setting = SETTINGS[name]
    place = found(net, where, setting)
    if hasattr(net, name):
        raise ValueError(f"{setting}: {type(net).__name__} has a `{name}` of its own\nRename that.")
    embedder: Any = net.get_submodule(place.embedder or "")
    sinusoids = None if place.sinusoids is None else net.get_submodule(place.sinusoids)
    addition = Addition(embedder, sinusoids, place, times * place.scale, absent)
    check_nothing(addition, setting)
    net.add_module(name, addition)
    embedder.additions = (*getattr(embedder, "additions", ()), addition)  # hidden from what goes through its children
    if add_all not in embedder._forward_hooks.values():
        embedder.register_forward_hook(add_all)


@torch.no_grad()
def check_nothing(addition: Addition, setting: str) -> None:
    """Raises ValueError if it is not nothing yet: the network would not begin as its teacher."""
    device, name = next(addition.embedder.parameters()).device, addition.place.embedder
    if device.type == "meta":
        return
    why, part = "", None
    try:
        part = addition.of(torch.ones(1, device=device))
    except (AttributeError, RuntimeError, TypeError) as error:
        why = f", but fails: {error}"
    if isinstance(part, Tensor) and (part.dim() < 2 or len(part) != 1):
        why, part = f", but {list(part.shape)}", None
    if not isinstance(part, Tensor):
        raise ValueError(
            f"{setting}: {name} makes no embedding [1, C] of a time [1], float32{why}\nName the module that does, and "
            "as `sinusoids` the one before it, if the time goes through that."
        )
    if part.any():
        raise ValueError(
            f"{setting}: {name} does not end with its last linear layer, so that it cannot be copied as a zero\n"
            "Name the module within it that does."
        )


def check_reached(net: nn.Module, call: Callable[[], Tensor], *, plainly: bool) -> None:
    """Raises ValueError if a call of the network passes by what it was given, or its backward loses the number.

    Args:
        call: of the network, with all numbers.
        plainly: whether it is trained by calls like this one, and not by graphs alone.
    """
    given, asked = added(net), set[str]()
    handles = [part.register_forward_hook(lambda *_, name=name: asked.add(name)) for name, part in given.items()]
    try:
        with torch.compiler.set_stance("force_eager"), torch.enable_grad():
            answer = call()
    finally:
        for handle in handles:
            handle.remove()
    for name in sorted(given.keys() - asked):
        raise ValueError(
            f"{SETTINGS[name]}: {given[name].place.embedder} is not called as a module in {type(net).__name__}, so "
            "that what is added to its embedding is passed by\nCall it as a whole (not layer by layer, nor by another "
            "method than forward); or name the module that is called."
        )
    if plainly:
        answer.square().sum().backward()
        net.zero_grad()


def in_backward() -> bool:
    """Whether a checkpointed module is run again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def add_all(embedder: Any, _: Any, embedding: Tensor) -> Tensor:
    """A hook without a closure, so that copies of a network have their own."""
    if not isinstance(embedding, Tensor):
        raise TypeError(
            f"{type(embedder).__name__} gives a {type(embedding).__name__}, not an embedding [B, C]: name the module "
            "within it that does, in student.second_time or student.embed_scale"
        )
    for addition in embedder.additions:
        part = addition(embedding)
        if part.shape != embedding.shape:
            raise ValueError(
                f"{addition.place.embedder} embeds {list(embedding.shape[:-1])} times, and {len(part)} samples have a "
                "number each"
            )
        embedding = embedding + part
    return embedding


def found(net: nn.Module, where: TimeInput, setting: str) -> TimeInput:
    """The place in this network, all of whose modules it has. Raises ValueError.

    A network of one's own may have it as `time_input`.
    """
    names = dict(net.named_modules())
    if where.embedder is None:
        classes = [cls.__name__ for cls in type(net).__mro__]  # FSDP makes a subclass
        own = getattr(net, "time_input", None)
        own = own if isinstance(own, TimeInput) else where
        where = next((KNOWN[name] for name in classes if name in KNOWN), own)
        if f"{where.embedder}" not in names and where.embedder is not None:  # Sana's, PixArt's
            parent, _, last = where.embedder.rpartition(".")
            where = below(f"{parent}.emb", where.scale) if f"{parent}.emb.{last}" in names else where
    likely = [name for name in names if "time" in name and "block" not in name and name.count(".") < 3]
    do = f"Name the module that embeds its time: {setting}={{embedder: NAME}}; likely ones: {likely[:8]}"
    if where.embedder is None:
        raise ValueError(f"{setting}: it is not known where {type(net).__name__} takes its time in\n{do}")
    for name in (where.embedder, where.sinusoids):
        if name is not None and name not in names:
            raise ValueError(f"{setting}: {type(net).__name__} has no module {name}\n{do}")
    if any(isinstance(names.get(name), torch._dynamo.OptimizedModule) for name in parents_of(where.embedder)):
        raise ValueError(
            f"{setting}: {where.embedder} of {type(net).__name__} is compiled by torch.compile(module), whose copies "
            "would run without what is added\nCompile it in place, by module.compile(), or leave that to the trainer."
        )
    if last_linear(names[where.embedder]) is None:
        raise ValueError(f"{setting}: {where.embedder} has no linear layer, so it embeds no time\n{do}")
    return where


def parents_of(name: str) -> list[str]:
    """The dotted name, and those of the modules that it is in."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def last_linear(module: nn.Module) -> Any:
    return next((m for m in reversed(list(module.modules())) if isinstance(m, nn.Linear)), None)


def added(net: nn.Module) -> dict[str, Addition]:
    """What a network was given, by name."""
    return {name: part for name in NAMES if isinstance(part := getattr(net, name, None), Addition)}


def of_addition(parameter: str, names: Iterable[str] = NAMES) -> bool:
    """Whether a parameter, by its dotted name in a network or in the TrigFlow around it, belongs to what was added."""
    return parameter.removeprefix("net.").partition(".")[0] in names


@torch.no_grad()
def fold(net: nn.Module, name: str, value: float) -> None:
    """Puts an addition of one number into the last bias of the embedder, which is the same function, and takes it out.

    Other networks that share the parameters keep theirs.

    Raises:
        ValueError: the embedder does not end with a linear layer that has a bias.
    """
    addition = added(net)[name]
    embedder: Any = net.get_submodule(addition.place.embedder or "")
    last, ends = last_linear(embedder), list[Tensor]()
    number = torch.full((1,), value, dtype=torch.float32, device=next(embedder.parameters()).device)
    handle = last.register_forward_hook(lambda module, args, out: ends.append(out))
    told = addition.input_of(number)
    if addition.sinusoids is not None:
        told = told.to(last.weight.dtype)
    whole = embedder.forward(told)  # without the hook that adds
    handle.remove()
    alone = last.bias is not None and sum(p is last.bias for _, p in net.named_parameters(remove_duplicate=False)) == 1
    if not alone or not (last is embedder or (len(ends) == 1 and torch.equal(whole, ends[0]))):
        raise ValueError(
            f"{addition.place.embedder} of {type(net).__name__} does not end with a linear layer that has a bias of "
            "its own and is called once, which could hold what a number adds"
        )
    total = last.bias.double() + addition.of(number)[0].double()
    last.bias = nn.Parameter(total.to(last.bias.dtype), requires_grad=last.bias.requires_grad)
    embedder.additions = tuple(other for other in embedder.additions if other is not addition)
    delattr(net, name)
