"""Which precision tangents have: that of the model, or float32 where the model computes in half precision."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["HALF", "PRECISIONS", "Policy", "Precision", "carried", "has_half", "precision_at", "widened"]

Precision = Literal["model", "float32", "float32_matmul"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
HALF = (torch.float16, torch.bfloat16)
# What wrappers put into the path of a module, which is none of the model's.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True)
class Policy:
    """A precision for each module and op: of the patterns that match, the last decides.

    ::

        Policy({"blocks.*.attn": "model", "blocks.0": "float32_matmul", "final:aten.mul": "float32_matmul"})

    Attributes:
        patterns: precision by pattern, which is that of a module's path in the model (``*`` stands for anything), and
            means the module with all its parts; behind a colon, that of ops as ``jvpgraph.explain`` names them.
            ``:aten.mm`` is an op anywhere. A mapping; it is kept as a tuple of pairs.
        default: where nothing matches.
        within: the path of the part of the model that is looked at.

    Raises:
        ValueError: an unknown precision; :meth:`check`: no module is called like that.
    """

    patterns: Mapping[str, Precision] | tuple[tuple[str, Precision], ...]
    default: Precision = "float32"
    within: str = ""

    def __post_init__(self) -> None:
        pairs = tuple(self.patterns.items()) if isinstance(self.patterns, Mapping) else tuple(self.patterns)
        for pattern, precision in (("default", self.default), *pairs):
            if precision not in PRECISIONS:
                known = ", ".join(map(repr, PRECISIONS))
                raise ValueError(f"unknown precision {precision!r} of {pattern!r}: choose one of {known}")
        object.__setattr__(self, "patterns", pairs)

    @staticmethod
    def auto(diagnosis: Any, *, error: float | None = None, budget: float | None = None) -> Policy:
        """The cheapest policy with at most this error, or the one with the least error for this budget.

        An estimate from what each op adds: diagnose the model with the policy, or call it, to see what it comes to.

        Args:
            diagnosis: what :func:`jvpgraph.diagnose` found.
            error: of the tangent, norm-wise and relative.
            budget: bytes that tangents read and write, as a multiple of those with ``"model"``: 1.2 and the like.

        Raises:
            ValueError: neither or both are given, or the error is below what the values of the model allow.
        """
        found: Policy = diagnosis.policy(error=error, budget=budget)
        return found

    @property
    def pairs(self) -> tuple[tuple[str, Precision], ...]:
        """(pattern, precision), in order."""
        return cast(tuple[tuple[str, Precision], ...], self.patterns)

    def at(self, path: str, op: OpOverload | str) -> Precision:
        """Of an op, or one of this name such as ``aten.add.Tensor``, in the module of this path."""
        names = (str(op), str(op).rpartition(".")[0])
        fitting = (precision for ops, precision in self.choices(path) if any(fnmatchcase(name, ops) for name in names))
        return functools.reduce(lambda _, precision: precision, fitting, self.default)

    def choices(self, path: str) -> tuple[tuple[str, Precision], ...]:
        """(pattern of ops, precision) of all patterns that match a module."""
        return _choices(self, path)

    def inside(self, path: str) -> Policy:
        """The same for a part of the model, in which paths begin anew."""
        return replace(self, within=_joined(self.within, path))

    def check(self, names: Iterable[str]) -> None:
        """Raise unless each pattern matches one of these paths, at least."""
        paths = [_own(name) for name in names]
        for pattern, _ in self.pairs:
            module = pattern.partition(":")[0]
            if module and not any(fnmatchcase(path, module) for path in paths):
                near = ", ".join(map(repr, difflib.get_close_matches(module, paths, 3, 0.4)))
                advice = (
                    f"did you mean {near}?" if near else "take a name of model.named_modules(), or a pattern of some"
                )
                raise ValueError(f"tangent_precision: no module is called {module!r}; {advice}")


@functools.lru_cache(maxsize=4096)
def _choices(policy: Policy, path: str) -> tuple[tuple[str, Precision], ...]:
    parts = _own(_joined(policy.within, path)).split(".")
    around = ("", *accumulate(parts, "{}.{}".format))
    found: list[tuple[str, Precision]] = []
    for pattern, precision in policy.pairs:
        module, _, ops = pattern.partition(":")
        if not module or any(fnmatchcase(name, module) for name in around):
            found.append((ops or "*", precision))
    return tuple(found)


def _joined(*parts: str) -> str:
    return ".".join(filter(None, parts))


def _own(path: str) -> str:
    """A path without what wrappers put into it."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def precision_at(precision: Precision | Policy, where: Callable[[], str], op: OpOverload) -> Precision:
    """Of an op in the module whose path ``where`` finds out; one for all, or by a policy."""
    return precision.at(where(), op) if isinstance(precision, Policy) else precision


def carried(precision: Precision | Policy) -> Precision:
    """In what tangents are handed on where one layout has to hold for all: outputs, storages, bodies of loops."""
    if not isinstance(precision, Policy):
        return precision
    return "model" if {precision.default, *dict(precision.pairs).values()} == {"model"} else "float32"


def widened(dtype: torch.dtype, precision: Precision | Policy = "float32") -> torch.dtype:
    """What tangents of primals of this dtype have."""
    return torch.float32 if carried(precision) != "model" and dtype in HALF else dtype


def has_half(value: Any) -> bool:
    """Whether there is a tensor in half precision in an argument of an op, which may be a list."""
    if isinstance(value, (list, tuple)):
        return any(map(has_half, value))
    return isinstance(value, Tensor) and value.dtype in HALF
