"""Turn any PyTorch diffusion transformer into one fused primal-plus-tangent graph.

dual = jvpgraph.transform(model)
y, y_dot = dual(x, t, tangents={"x": x_dot, "t": t_dot})

Importing the package alone imports no torch, which would make `jvpgraph --help` wait for seconds. The first use of
anything in it does, and registers all rules and ops.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jvpgraph.api import DualModule, jvp, transform
    from jvpgraph.config import Config
    from jvpgraph.diagnosis import Diagnosis, diagnose
    from jvpgraph.dynamo_backend import backend
    from jvpgraph.errors import CaptureError, JvpgraphError, NonFiniteTangent, UnsupportedOp
    from jvpgraph.explain import Explanation
    from jvpgraph.markers import make_dual, tangent_of
    from jvpgraph.precision import Policy

__all__ = [
    "CaptureError",
    "Config",
    "Diagnosis",
    "DualModule",
    "Explanation",
    "JvpgraphError",
    "NonFiniteTangent",
    "Policy",
    "UnsupportedOp",
    "backend",
    "diagnose",
    "jvp",
    "make_dual",
    "tangent_of",
    "transform",
]
__version__ = "0.1.0"

DEFINED_IN = {
    "api": ("DualModule", "jvp", "transform"),
    "config": ("Config",),
    "diagnosis": ("Diagnosis", "diagnose"),
    "dynamo_backend": ("backend",),
    "errors": ("CaptureError", "JvpgraphError", "NonFiniteTangent", "UnsupportedOp"),
    "explain": ("Explanation",),
    "markers": ("make_dual", "tangent_of"),
    "precision": ("Policy",),
}


def __getattr__(name: str) -> Any:
    """A public name or a module of the package, on the first access to either; after that all are plain attributes."""
    if name not in __all__ and importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module, names in DEFINED_IN.items():
        found = importlib.import_module(f"{__name__}.{module}")
        globals().update({public: getattr(found, public) for public in names})
    return globals()[name] if name in __all__ else importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
