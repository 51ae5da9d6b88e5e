"""Which parts of a model become regions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Choice", "check_choice", "find_regions", "fingerprint", "hooks_forbid_one_graph", "parts_of"]

Choice = str | type[nn.Module] | Sequence[type[nn.Module]] | Callable[[nn.Module], bool]
SMALL = 0.05  # of the parameters of the largest group: below, one that "auto" finds is not worth a graph


def check_choice(choice: Choice) -> None:
    """Raises: ValueError: not what ``transform`` takes as regions."""
    classes = choice if isinstance(choice, (tuple, list)) else (choice,) if isinstance(choice, type) else ()
    wrong = [c for c in classes if not (isinstance(c, type) and issubclass(c, nn.Module))]
    asks = callable(choice) and not isinstance(choice, nn.Module)
    if wrong or not (choice == "auto" or classes or asks):
        raise ValueError(
            f"regions must be None, 'auto', one or more classes of modules, or a function of a module, not {choice!r}"
        )


def find_regions(model: nn.Module, choice: Choice) -> list[tuple[str, nn.Module]]:
    """Names and modules of the outermost regions; for "auto" none, where a model has no parts.

    Raises:
        ValueError: no module of the model is one of those that were asked for, or whole ones.
    """
    candidates = {name: module for name, module in model.named_modules() if _has_forward(module)}
    if choice == "auto":
        found = _repeated(model, candidates)
    else:
        wanted: Any = choice
        if isinstance(choice, (type, tuple, list)):
            classes = choice if isinstance(choice, type) else tuple(choice)
            wanted = lambda module: isinstance(module, classes)  # noqa: E731
        found = _outermost({name: module for name, module in candidates.items() if wanted(module)})
    inside = [name for name, module in candidates.items() if name and _shards_inside(module)]
    if not found and (choice != "auto" or inside):
        kinds = sorted({type(module).__name__ for name, module in candidates.items() if name and not _is_plain(module)})
        why = ""
        if inside and choice == "auto":
            why = f": parts inside of {', '.join(inside[:3])} are sharded on their own, shard whole blocks"
        raise ValueError(
            f"no module of {type(model).__name__} is a region; it has {', '.join(kinds) or 'no parts'}{why}"
        )
    return found


def fingerprint(module: nn.Module) -> Any:
    """Equal for modules of equal structure. Whether they can share a graph in the end is up to Dynamo's guards."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return (
        tuple((name, type(m)) for name, m in module.named_modules()),
        tuple((name, tuple(x.shape), x.dtype, x.requires_grad) for name, x in tensors),
    )


def hooks_forbid_one_graph(model: nn.Module) -> str:
    """Why the model's hooks cannot be compiled with it; empty if they can."""
    if isinstance(model, DistributedDataParallel):
        return "DistributedDataParallel"
    return "FSDP2" if any(vars(m).get("_is_fsdp_managed_module", False) for m in model.modules()) else ""


def parts_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost parts of a module that are more than one layer of PyTorch's."""
    parts = {name: m for name, m in module.named_modules() if name and _has_forward(m)}
    return _outermost({name: m for name, m in parts.items() if not _is_plain(m) and not _shards_inside(m)})


def _repeated(model: nn.Module, candidates: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """The outermost blocks that occur more than once or stand in a list, and hold a good part of the parameters."""
    blocks = {name: m for name, m in candidates.items() if name and not _is_plain(m) and not _shards_inside(m)}
    prints = {name: fingerprint(m) for name, m in blocks.items()}
    count: dict[Any, int] = {}
    for key in prints.values():
        count[key] = count.get(key, 0) + 1
    listed = {id(m) for parent in model.modules() if isinstance(parent, nn.ModuleList) for m in _unwrapped(parent)}
    repeated = {name: m for name, m in blocks.items() if count[prints[name]] > 1 or id(m) in listed}
    found = _outermost(repeated)
    size: dict[Any, int] = {}
    for name, m in found:
        size[prints[name]] = size.get(prints[name], 0) + sum(p.numel() for p in m.parameters())
    large = [(name, m) for name, m in found if size[prints[name]] >= SMALL * max(size.values())]
    return large or _outermost(blocks)


def _outermost(modules: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Those that are not inside another one, each once."""
    inside = {id(part) for m in modules.values() for part in m.modules() if part is not m}
    return [(name, m) for name, m in modules.items() if id(m) not in inside]


def _has_forward(module: nn.Module) -> bool:
    """Containers are not called, wrappers for checkpointing stay around the region, and TorchScript is not captured."""
    if isinstance(module, (ActivationWrapper, torch.jit.ScriptModule)):
        return False
    return type(module).forward is not nn.Module.forward


def _is_plain(module: nn.Module) -> bool:
    """A single layer of PyTorch's, or nothing to compute with."""
    alone = next(iter(module.children()), None) is None
    return next(module.parameters(), None) is None or (alone and _own_class(module).__module__.startswith("torch.nn."))


def _own_class(module: nn.Module) -> type:
    return next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))


def _shards_inside(module: nn.Module) -> bool:
    return any(isinstance(part, FSDPModule) for part in module.modules() if part is not module)


def _unwrapped(modules: nn.ModuleList) -> Iterator[nn.Module]:
    for module in modules:
        while isinstance(module, ActivationWrapper):
            module = module._checkpoint_wrapped_module
        yield module
