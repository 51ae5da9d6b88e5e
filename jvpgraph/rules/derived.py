"""Derived rules: PyTorch's own forward formulas, borrowed one op at a time.

For an op that is not in the table, ``torch.func.jvp`` of that single call gives the tangent; run under the
recorder it leaves the formula's ops in the graph. Only ATen's ops qualify: each of them has a formula or
refuses, whereas over a custom op functorch returns a zero without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

__all__ = ["NotDerivable", "derive"]


class NotDerivable(Exception):
    """PyTorch has no forward derivative for this op."""


def derive(op: OpOverload, out: Any, arguments: dict[str, Any], dots: dict[str, Any]) -> Any:
    """Output tangents of ``op(**arguments)`` by forward AD over this one op; zeros come back as zero tensors.

    Raises:
        NotDerivable: the op has no forward derivative in PyTorch.
    """
    if op.namespace != "aten":
        raise NotDerivable(f"{op.namespace} is not ATen, so there is no formula to derive from")
    if torch.Tag.nondeterministic_seeded in op.tags:
        raise NotDerivable("it draws random numbers, and deriving would draw them again")
    primals, tangents, places = [], [], []
    for name, dot in dots.items():
        listed = isinstance(dot, (list, tuple))
        for i, d in enumerate(dot if listed else [dot]):
            if d is not None:
                places.append((name, i if listed else None))
                primals.append(arguments[name][i] if listed else arguments[name])
                tangents.append(d)

    positional = [a.name for a in op._schema.arguments if not a.kwarg_only]

    def call(*active: torch.Tensor) -> Any:
        values = {name: list(v) if isinstance(v, (list, tuple)) else v for name, v in arguments.items()}
        for (name, i), x in zip(places, active):
            if i is None:
                values[name] = x
            else:
                values[name][i] = x
        keywords = {name: v for name, v in values.items() if name not in positional}
        return op(*(values[name] for name in positional), **keywords)

    try:
        with torch.no_grad():
            return torch.func.jvp(call, tuple(primals), tuple(tangents))[1]
    except NotImplementedError as error:
        raise NotDerivable("PyTorch has no forward formula for it") from error
    except RuntimeError as error:
        if "forward AD" not in str(error) and "jvp" not in str(error):
            raise
        raise NotDerivable(str(error).splitlines()[0]) from error
