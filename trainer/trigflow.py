"""TrigFlow: every Gaussian diffusion model in one set of coordinates (Lu & Song 2024, section 3).

    x_t = cos(t) x0 + sin(t) eps,   t in [0, pi/2] radians,   data of unit variance
    F(x_t, t) predicts the velocity dx_t/dt = cos(t) eps - sin(t) x0
    f(x_t, t) = cos(t) x_t - sin(t) F   is the clean image that F implies;   f(x, 0) = x

A model trained on x_s = alpha(s) x0 + sigma(s) eps is brought there by matching noise-to-signal ratios,
sigma(s) / alpha(s) = tan(t). Only alpha, sigma and what the model predicts are written down; sympy derives
the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import sympy
import torch
from sympy import cos, sin
from torch import Tensor, nn

from jvpgraph.trainer.batch import Condition, expand_condition

Coefficient = Callable[[Tensor], Tensor]

s = sympy.Symbol("s", positive=True)  # a model's own time
t = sympy.Symbol("t", positive=True)  # TrigFlow time, radians
ratio = sympy.Symbol("ratio", positive=True)  # sigma / alpha


@dataclass(frozen=True)
class Schedule:
    """x_s = alpha x0 + sigma eps, and a model that predicts u = on_data x0 + on_noise eps; functions of `s`.

    Input and prediction are two linear equations in x0 and eps. With W = alpha on_noise - sigma on_data,

        x0 = (on_noise x_s - sigma u) / W,   eps = (alpha u - on_data x_s) / W,   x_s = c_in x_t,

    which gives x0 = c_skip x_t + c_out u and F = f_skip x_t + f_out u. Nothing divides by sin(t).
    """

    name: str
    alpha: sympy.Expr
    sigma: sympy.Expr
    on_data: sympy.Expr
    on_noise: sympy.Expr

    @cached_property
    def expressions(self) -> dict[str, sympy.Expr]:
        """time, c_in, c_skip, c_out, f_skip and f_out as expressions in `t`."""
        (time,) = sympy.solve(sympy.simplify(self.sigma / self.alpha) - ratio, s)
        time = tidy(time.subs(sympy.atan(ratio), t).subs(ratio, sin(t) / cos(t)))
        alpha, sigma, a, b = (tidy(e.subs(s, time)) for e in (self.alpha, self.sigma, self.on_data, self.on_noise))
        c_in = tidy(alpha * cos(t) + sigma * sin(t))  # sqrt(alpha^2 + sigma^2)
        determinant = tidy(alpha * b - sigma * a)
        derived = {
            "time": time,
            "c_in": c_in,
            "c_skip": c_in * b / determinant,
            "c_out": -sigma / determinant,
            "f_skip": -c_in * (cos(t) * a + sin(t) * b) / determinant,
            "f_out": (cos(t) * alpha + sin(t) * sigma) / determinant,
        }
        return {name: tidy(expression) for name, expression in derived.items()}

    def coefficient(self, name: str) -> Coefficient:
        """One of `expressions` as a function from float64 times to float64 values, both [B]."""
        expression = self.expressions[name]
        if expression.is_constant():
            return partial(torch.full_like, fill_value=float(expression))
        return sympy.lambdify(t, expression, modules=[{"sin": torch.sin, "cos": torch.cos}])


def tidy(expression: sympy.Expr) -> sympy.Expr:
    """One fraction in lowest terms, with sin^2 + cos^2 = 1."""
    return sympy.cancel(expression).subs(sin(t) ** 2 + cos(t) ** 2, 1)


def velocity_schedule(name: str, alpha: sympy.Expr, sigma: sympy.Expr) -> Schedule:
    """A model that predicts dx_s/ds = alpha'(s) x0 + sigma'(s) eps."""
    return Schedule(name, alpha, sigma, on_data=sympy.diff(alpha, s), on_noise=sympy.diff(sigma, s))


# Flux, SD3, Wan, Cosmos and the digits demo: the model predicts eps - x0
RECTIFIED_FLOW = velocity_schedule("rectified flow", alpha=1 - s, sigma=s)
# variance preserving: v-prediction up to the factor pi / 2 of its time
COSINE = velocity_schedule("cosine", alpha=sympy.cos(sympy.pi * s / 2), sigma=sympy.sin(sympy.pi * s / 2))
# variance exploding (Karras et al. 2022), s being the noise level: the velocity is eps itself
EDM = velocity_schedule("EDM", alpha=sympy.Integer(1), sigma=s)


def expand_like(c: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], to multiply x [B, ...]."""
    return c.reshape(-1, *[1] * (x.dim() - 1))


def add_noise(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = cos(t) x0 + sin(t) eps; x0 and eps [B, ...], t [B] radians."""
    return expand_like(t.cos(), x0) * x0 + expand_like(t.sin(), x0) * eps


def clean_image(F: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """f(x_t, t) = cos(t) x_t - sin(t) F; F and x [B, ...], t [B] radians."""
    return expand_like(t.cos(), x) * x - expand_like(t.sin(), x) * F


Call = Callable[..., Tensor]
"""(net, x_s, time, cond) -> prediction: how a network is called; with `time_r=` if it takes a second time."""


def call_plainly(net: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """For networks of the form net(x, time, **cond)."""
    return net(x, time, **cond)


class TrigFlow(nn.Module):
    """A network in TrigFlow coordinates: x_t [B, ...], t [B] radians, its conditions -> F [B, ...], float64.

    The network runs in its own dtype. Coefficients are taken in float64, because float32 loses them near both
    ends of the time axis; the network's time is rounded once, to float32.

    Args:
        net: what is trained.
        call: call(net, x_s, time_scale * s, cond) gives the prediction that `schedule` names.
        schedule: what the network was trained on.
        time_scale: the network's time at s = 1; 1000 for most public video and image models.
    """

    def __init__(
        self,
        net: nn.Module,
        call: Call = call_plainly,
        schedule: Schedule = RECTIFIED_FLOW,
        *,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.net = net
        self.call = call
        self.schedule = schedule
        self.time_scale = time_scale
        self.s_of_t = schedule.coefficient("time")
        self.c_in = schedule.coefficient("c_in")
        self.f_skip = schedule.coefficient("f_skip")
        self.f_out = schedule.coefficient("f_out")

    def forward(self, x: Tensor, t: Tensor, cond: Condition, r: Tensor | None = None) -> Tensor:
        """`r` [B] radians: the second time of an average-velocity network (MeanFlow)."""
        x, t = x.double(), t.double()
        x_s = expand_like(self.c_in(t), x) * x
        second = {} if r is None else {"time_r": self.network_time(r.double())}
        u = self.call(self.net, x_s.to(next(self.net.parameters()).dtype), self.network_time(t), cond, **second)
        return expand_like(self.f_skip(t), x) * x + expand_like(self.f_out(t), x) * u.double()

    def network_time(self, t: Tensor) -> Tensor:
        return (self.time_scale * self.s_of_t(t)).float()


class Guided(nn.Module):
    """Classifier-free guidance: F_negative + scale (F - F_negative); a scale of 1 costs one pass only.

    Args:
        negative: the condition of no or a negative prompt, each [1, ...].
    """

    def __init__(self, model: nn.Module, scale: float, negative: Condition) -> None:
        super().__init__()
        self.model = model
        self.scale = scale
        self.negative = dict(negative)

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        F = self.model(x, t, cond)
        if self.scale == 1:
            return F
        F_negative = self.model(x, t, expand_condition(self.negative, len(x)))
        return F_negative + self.scale * (F - F_negative)
