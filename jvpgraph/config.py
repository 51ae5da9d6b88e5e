"""The settings of a transform."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jvpgraph.precision import PRECISIONS, Policy, Precision

__all__ = ["Config"]


@dataclass(frozen=True)
class Config:
    """How a model is transformed. The defaults suit every model; each field says what it is for."""

    swap_attention: bool = True
    """Replace scaled_dot_product_attention, flex_attention and attention written by hand on the tangent path by the
    fused, memory-linear op. False is short for skipping the passes that do so."""

    recognize_attention: bool = True
    """Also recognise softmax(q k') v written by hand. False is short for skipping the pass of that name."""

    check_finite: bool = False
    """After each call, raise NonFiniteTangent naming the first module whose tangent is NaN or infinite. Costs one
    reduction and a device synchronisation per output, and an op-by-op run when it fires."""

    tangent_precision: Precision | Policy = "float32"
    """What tangents of half-precision primals have: "float32", which keeps them in float32 between products, attention
    and collectives, whose operands have the dtype of the primal; "model", the dtype of the primal; "float32_matmul",
    float32 in products and attention, too; or a :class:`jvpgraph.Policy`, which says so for modules and ops. The
    tangents of outputs are float32 except with "model". Values are the same with each."""

    verify: bool = True
    """Check the graph's invariants after every pass (milliseconds)."""

    skip_passes: tuple[str, ...] = ()
    """Names of optional passes to leave out, for instance to find the one at fault; an unknown name is an error."""

    dump: str | None = field(default_factory=lambda: os.environ.get("JVPGRAPH_DUMP"))
    """Folder for one readable file per pass. Default: the environment variable JVPGRAPH_DUMP."""

    keep_graphs: bool = False
    """Keep the text of the graph after every pass in ``dual.reports[-1].graphs``."""

    inductor: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Settings of torch._inductor.config during compilation, as in torch.compile(options=...)."""

    def __post_init__(self) -> None:
        if not isinstance(self.tangent_precision, Policy) and self.tangent_precision not in PRECISIONS:
            known = ", ".join(map(repr, PRECISIONS))
            raise ValueError(
                f"unknown tangent_precision {self.tangent_precision!r}: choose one of {known}, or give a Policy"
            )
        skipped = set(self.skip_passes)
        if not self.swap_attention:
            skipped |= {"swap_attention", "swap_flex_attention", "recognize_attention"}
        if not self.recognize_attention:
            skipped.add("recognize_attention")
        object.__setattr__(self, "skip_passes", tuple(sorted(skipped)))
        object.__setattr__(self, "swap_attention", "swap_attention" not in skipped)
        object.__setattr__(self, "recognize_attention", "recognize_attention" not in skipped)
