"""Turn any PyTorch diffusion transformer into one fused primal-plus-tangent graph.

dual = jvpgraph.transform(model)
y, y_dot = dual(x, t, tangents={"x": x_dot, "t": t_dot})
"""

from jvpgraph.api import DualModule, jvp, transform
from jvpgraph.backend import backend
from jvpgraph.config import Config
from jvpgraph.errors import CaptureError, JvpgraphError, NonFiniteTangent, UnsupportedOp
from jvpgraph.explain import Explanation
from jvpgraph.markers import make_dual, tangent_of

__all__ = [
    "CaptureError",
    "Config",
    "DualModule",
    "Explanation",
    "JvpgraphError",
    "NonFiniteTangent",
    "UnsupportedOp",
    "backend",
    "jvp",
    "make_dual",
    "tangent_of",
    "transform",
]
