"""Checking a transformed model against derivatives that share nothing with this package.

    print(check_jvp(model, (x, t), tangents={"x": x_dot, "t": t_dot}))

The oracle is a float64 copy of the model with the math attention: PyTorch's forward AD of that copy if it exists
and agrees with central differences, otherwise the differences. Casts to narrower types inside the model are float64
in the copy, so their cost counts as rounding, for which the tolerance leaves room.
"""

from jvpgraph.testing.check import check_jvp, float64_tangent
from jvpgraph.testing.report import Comparison, Deviation, JvpCheck, JvpMismatch
from jvpgraph.testing.tolerances import RTOL

__all__ = ["RTOL", "Comparison", "Deviation", "JvpCheck", "JvpMismatch", "check_jvp", "float64_tangent"]
