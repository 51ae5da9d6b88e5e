"""The settings of a transform: one object, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jvpgraph.config import Config
from jvpgraph.dynamo_backend import COMPILERS, Backend
from jvpgraph.precision import carried
from jvpgraph.regions import Choice, check_choice

__all__ = ["BACKENDS", "Settings"]

BACKENDS = (*COMPILERS, "op_by_op")


@dataclass(frozen=True)
class Settings:
    """Shared by ``transform``, ``jvp``, ``explain`` and copies; the fields are the arguments of ``transform``.

    Raises:
        ValueError: an unknown backend, settings that exclude each other, or a Backend and a config that differ.
    """

    backend: str | Backend = "inductor"
    regions: Choice | None = None
    dynamic: bool | None = None
    differentiable_tangent: bool = False
    config: Config = field(default_factory=Config)
    has_aux: bool = False
    tangents_batched: bool | int = False

    @classmethod
    def of(cls, *, backend: str | Backend, config: Config | None, **others: Any) -> Settings:
        """With the config of the backend where none is given."""
        own = backend.config if isinstance(backend, Backend) else Config()
        return cls(backend=backend, config=own if config is None else config, **others)

    def __post_init__(self) -> None:
        if isinstance(self.backend, Backend):
            if self.config != self.backend.config:
                raise ValueError("config= differs from the config of the backend: pass it to jvpgraph.backend() only")
        elif self.backend not in BACKENDS:
            raise ValueError(f"unknown backend {self.backend!r}: choose one of {', '.join(map(repr, BACKENDS))}")
        if self.tangents_batched < 0:
            raise ValueError(f"tangents_batched is how many tangents there are, not {self.tangents_batched}")
        if self.needs_one_graph and not self.compiles:
            raise ValueError(f'{self.needs_one_graph} needs one graph, and so another backend than "op_by_op"')
        if self.regions is not None and (self.needs_one_graph or not self.compiles):
            other = self.needs_one_graph or 'backend="op_by_op"'
            raise ValueError(f"regions, graphs with op-by-op code between them, cannot be combined with {other}")
        if self.regions is not None:
            check_choice(self.regions)

    @property
    def needs_one_graph(self) -> str:
        """What cannot be done op by op, if that is asked for."""
        if self.differentiable_tangent:
            return "differentiable_tangent=True"
        return f"tangents_batched={self.tangents_batched}" if self.tangents_batched else ""

    @property
    def wide(self) -> bool:
        """Whether tangents of half-precision values may be float32."""
        return carried(self.config.tangent_precision) != "model"

    @property
    def compiles(self) -> bool:
        return self.backend != "op_by_op"

    @property
    def compiler(self) -> str:
        """Which of COMPILERS makes code of graphs, or "op_by_op"."""
        return self.backend.compiler if isinstance(self.backend, Backend) else self.backend
