"""TrigFlow: every Gaussian diffusion model in one set of coordinates (Lu & Song 2024, section 3).

    x_t = cos(t) x0 + sin(t) eps,   t in [0, pi/2] radians,   data of unit variance
    F(x_t, t) predicts the velocity dx_t/dt = cos(t) eps - sin(t) x0
    f(x_t, t) = cos(t) x_t - sin(t) F   is the clean image that F implies;   f(x, 0) = x

A model trained on x_s = alpha(s) x0 + sigma(s) eps is converted by matching noise-to-signal ratios,
sigma(s) / alpha(s) = tan(t). Only alpha, sigma and what the model predicts are written down; sympy derives
the rest.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain

import sympy
import torch
from sympy import cos, sin
from torch import Tensor, nn

from jvpgraph.trainer.batch import Condition, expand_condition

Coefficient = Callable[[Tensor], Tensor]

s = sympy.Symbol("s", positive=True)  # a model's own time
t = sympy.Symbol("t", positive=True)  # TrigFlow time, radians
ratio = sympy.Symbol("ratio", positive=True)  # sigma / alpha


PREDICTIONS = ("velocity", "noise", "data", "v", "F")
HALF_PI = math.pi / 2
STEEPEST = math.atan(500.0)
"""Where noise predictions end and, mirrored, data predictions begin: x0 would be 0 / 0 beyond. 500 = 1 / 0.002."""


@dataclass(frozen=True)
class Schedule:
    """x_s = alpha x0 + sigma eps, and a model that predicts u = on_data x0 + on_noise eps; functions of `s`.

    Input and prediction are two linear equations in x0 and eps. With W = alpha on_noise - sigma on_data,

        x0 = (on_noise x_s - sigma u) / W,   eps = (alpha u - on_data x_s) / W,   x_s = c_in x_t,

    which gives x0 = c_skip x_t + c_out u and F = f_skip x_t + f_out u. Nothing divides by sin(t) unless the
    model predicts the data, nor by cos(t) unless it predicts the noise.

    Attributes:
        predicts: "velocity" dx_s/ds; "noise" eps; "data" x0; "v" alpha eps - sigma x0; or "F" itself.
        inverse: s as an expression in `t`, where sympy cannot solve sigma / alpha = tan(t) for it.
        s_range: the times that the model was trained on; None if they reach both ends.
    """

    name: str
    alpha: sympy.Expr
    sigma: sympy.Expr
    predicts: str = "velocity"
    inverse: sympy.Expr | None = None
    s_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.predicts not in PREDICTIONS:
            raise ValueError(f"a model predicts one of {', '.join(PREDICTIONS)}, not {self.predicts!r}")

    def predicting(self, what: str) -> Schedule:
        """The same noise, for a model that predicts `what`."""
        return replace(self, predicts=what)

    @cached_property
    def prediction(self) -> tuple[sympy.Expr, sympy.Expr]:
        """(on_data, on_noise), functions of `s`."""
        if self.predicts == "velocity":
            return sympy.diff(self.alpha, s), sympy.diff(self.sigma, s)
        return linear_prediction(self.predicts, self.alpha, self.sigma, sympy.sqrt(self.alpha**2 + self.sigma**2))

    @cached_property
    def t_range(self) -> tuple[float, float]:
        """The first and last TrigFlow time in radians that the model was trained on."""
        first, last = 0.0, HALF_PI
        if self.s_range is not None:
            first, last = (
                math.atan2(float(self.sigma.subs(s, end)), float(self.alpha.subs(s, end))) for end in self.s_range
            )
        if self.predicts == "noise":
            last = min(last, STEEPEST)
        elif self.predicts == "data":
            first = max(first, HALF_PI - STEEPEST)
        return first, last

    @cached_property
    def preserves_variance(self) -> bool:
        """alpha^2 + sigma^2 = 1."""
        return self.sigma == sympy.sqrt(1 - self.alpha**2) or sympy.simplify(self.alpha**2 + self.sigma**2) == 1

    @cached_property
    def expressions(self) -> dict[str, sympy.Expr]:
        """time, c_in, c_skip, c_out, f_skip and f_out as expressions in `t`."""
        if self.inverse is None:
            (time,) = sympy.solve(sympy.simplify(self.sigma / self.alpha) - ratio, s)
            time = tidy(time.subs(sympy.atan(ratio), t).subs(ratio, sin(t) / cos(t)))
        else:
            time = self.inverse
        if self.preserves_variance:
            alpha, sigma = cos(t), sin(t)  # whatever the time, the ratio leaves no other choice
        else:
            alpha, sigma = tidy(self.alpha.subs(s, time)), tidy(self.sigma.subs(s, time))
        c_in = tidy(alpha * cos(t) + sigma * sin(t))  # sqrt(alpha^2 + sigma^2)
        if self.predicts == "velocity":
            a, b = (e.subs(s, time) for e in self.prediction)
            if self.inverse is None:
                a, b = tidy(a), tidy(b)
        else:
            a, b = linear_prediction(self.predicts, alpha, sigma, c_in)
        determinant = alpha * b - sigma * a
        derived = {
            "c_in": c_in,
            "c_skip": c_in * b / determinant,
            "c_out": -sigma / determinant,
            "f_skip": -c_in * (cos(t) * a + sin(t) * b) / determinant,
            "f_out": (cos(t) * alpha + sin(t) * sigma) / determinant,
        }
        if self.inverse is None or self.predicts != "velocity":  # cancelling roots of polynomials takes hours
            derived = {name: tidy(expression) for name, expression in derived.items()}
        return {"time": time} | derived

    def coefficient(self, name: str) -> Coefficient:
        """One of `expressions` as a function from float64 times to float64 values, both [B].

        Times outside t_range count as its nearer end: values and tangents stay finite up to pi / 2.
        """
        expression = self.expressions[name]
        if not expression.has(t):
            return partial(torch.full_like, fill_value=float(expression))
        function = sympy.lambdify(t, expression, modules=[TORCH], cse=True)
        first, last = self.t_range
        if (first, last) == (0.0, HALF_PI):
            return function
        return lambda t: function(t.clamp(first, last))


TORCH = {name: getattr(torch, name) for name in ("sin", "cos", "tan", "log", "exp", "sqrt")}


def linear_prediction(
    what: str, alpha: sympy.Expr, sigma: sympy.Expr, norm: sympy.Expr
) -> tuple[sympy.Expr, sympy.Expr]:
    """(on_data, on_noise) of a prediction that knows no derivative; norm = sqrt(alpha^2 + sigma^2)."""
    zero, one = sympy.Integer(0), sympy.Integer(1)
    table = {
        "noise": (zero, one),
        "data": (one, zero),
        "v": (-sigma, alpha),
        "F": (-sigma / norm, alpha / norm),
    }
    return table[what]


def tidy(expression: sympy.Expr) -> sympy.Expr:
    """One fraction in lowest terms, with sin^2 + cos^2 = 1."""
    return sympy.cancel(expression).subs(sin(t) ** 2 + cos(t) ** 2, 1)


def discrete_schedule(name: str, first: float, last: float, power: int, steps: int = 1000) -> Schedule:
    """The variance-preserving chain of DDPM, whose betas grow like the `power`-th power of a line; s = n / steps.

    After m = n + 1 steps alpha^2 is the product of the 1 - beta_i, so

        -log alpha^2 = sum over i < m of (beta_i + beta_i^2 / 2 + beta_i^3 / 3 + ...),

    a polynomial in m (Faulhaber), which thereby means something between the integers too. It is inverted by
    Newton's method, starting from what the integral of beta alone gives.
    """
    i, m, decay = sympy.symbols("i m decay", positive=True)
    offset, slope = first ** (1 / power), (last ** (1 / power) - first ** (1 / power)) / (steps - 1)
    beta = (offset + slope * i) ** power
    series = sympy.Poly(sympy.expand(sum(beta**k / k for k in (1, 2, 3))), i)
    total = sum(c * power_sum(k, m) for (k,), c in series.terms())
    rate = sympy.diff(total, m)

    inverse = ((offset ** (power + 1) + (power + 1) * slope * decay) ** sympy.Rational(1, power + 1) - offset) / slope
    for _ in range(2):  # the start is at most 4 steps off, the first one 5e-3, the second 1e-7
        inverse = inverse - (total.subs(m, inverse) - decay) / rate.subs(m, inverse)

    alpha = sympy.exp(-total.subs(m, steps * s + 1) / 2)
    return Schedule(
        name,
        alpha=alpha,
        sigma=sympy.sqrt(1 - alpha**2),
        predicts="noise",
        inverse=(inverse.subs(decay, -2 * sympy.log(cos(t))) - 1) / steps,
        s_range=(0.0, 1 - 1 / steps),
    )


def power_sum(k: int, m: sympy.Symbol) -> sympy.Expr:
    """0^k + 1^k + ... + (m - 1)^k as a polynomial in m."""
    return sympy.expand((sympy.bernoulli(k + 1, m) - sympy.bernoulli(k + 1, 0)) / (k + 1))


def edm_network(sigma_data: float, first: float = 0.002, last: float = 80.0) -> Schedule:
    """The network inside Karras et al.'s preconditioning: its input is x_t, its time s = log(noise level) / 4.

    Noise level / sigma_data = tan(t). D = c_skip x + c_out u of their table 1 is sigma_data f(x_t, t) with
    F = -u: negate what such a network returns.
    """
    level = sympy.exp(4 * s)
    norm = sympy.sqrt(level**2 + sigma_data**2)
    return Schedule(
        "edm network",
        alpha=sigma_data / norm,
        sigma=level / norm,
        predicts="F",
        inverse=sympy.log(sigma_data * sin(t) / cos(t)) / 4,
        s_range=(math.log(first) / 4, math.log(last) / 4),
    )


# Flux, SD3, Wan, Cosmos 2 and the digits demo: the model predicts eps - x0
RECTIFIED_FLOW = Schedule("rectified flow", alpha=1 - s, sigma=s)
# variance preserving: v-prediction up to the factor pi / 2 of its time
COSINE = Schedule("cosine", alpha=sympy.cos(sympy.pi * s / 2), sigma=sympy.sin(sympy.pi * s / 2))
# DiT and PixArt predict the noise of DDPM's chain; Stable Diffusion's betas are squares of a line
VP_LINEAR = discrete_schedule("vp linear", 1e-4, 0.02, power=1)
VP_SCALED_LINEAR = discrete_schedule("vp scaled linear", 0.00085, 0.012, power=2)
# variance exploding (Karras et al. 2022), s being the noise level: the velocity is eps itself
EDM = Schedule("edm", alpha=sympy.Integer(1), sigma=s, s_range=(0.002, 80.0))
# Cosmos 1: the same noise as its network sees it
EDM_NETWORK = edm_network(sigma_data=0.5)

SCHEDULES = {known.name: known for known in (RECTIFIED_FLOW, COSINE, VP_LINEAR, VP_SCALED_LINEAR, EDM, EDM_NETWORK)}


def schedule(name: str, predicts: str | None = None) -> Schedule:
    """schedule("vp linear", predicts="v"): one of SCHEDULES, predicting what is usual for it by default."""
    if name not in SCHEDULES:
        raise ValueError(f"no schedule is called {name!r}; known are {', '.join(SCHEDULES)}")
    return SCHEDULES[name] if predicts is None else SCHEDULES[name].predicting(predicts)


def expand_like(c: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], to multiply x [B, ...]."""
    return c.reshape(-1, *[1] * (x.dim() - 1))


def add_noise(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = cos(t) x0 + sin(t) eps; x0 and eps [B, ...], t [B] radians."""
    return expand_like(t.cos(), x0) * x0 + expand_like(t.sin(), x0) * eps


def velocity_of(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """dx_t/dt = cos(t) eps - sin(t) x0; x0 and eps [B, ...], t [B] radians."""
    return expand_like(t.cos(), x0) * eps - expand_like(t.sin(), x0) * x0


def clean_image(F: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """f(x_t, t) = cos(t) x_t - sin(t) F; F and x [B, ...], t [B] radians."""
    return expand_like(t.cos(), x) * x - expand_like(t.sin(), x) * F


def along_trajectory(x: Tensor, t: Tensor, F: Tensor) -> dict[str, Tensor]:
    """Tangents of x_t and t along dx/dt = F, times cos(t) sin(t); x and F [B, ...], t [B] radians."""
    speed = t.cos() * t.sin()
    return {"x": expand_like(speed, x) * F, "t": speed}


Call = Callable[..., Tensor]
"""(net, x_s, time, cond) -> prediction: how a network is called; with `time_r=` if it takes a second time."""


def call_plainly(net: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """For networks of the form net(x, time, **cond); embeddings come in the dtype of x."""
    return net(x, time, **{name: to_network(c, x.dtype) for name, c in cond.items()})


def to_network(c: Tensor, dtype: torch.dtype) -> Tensor:
    """Embeddings in the network's dtype; labels, masks and one number per sample (a guidance scale) as they are."""
    return c.to(dtype) if c.is_floating_point() and c.dim() > 1 else c


def dtype_of_layers(net: nn.Module) -> torch.dtype:
    """That of the first weight in a layer; tables, masks and positions of the network itself may have another."""
    layers = (p for child in net.children() for p in child.parameters())
    weights = (p.dtype for p in chain(layers, net.parameters()) if p.dtype.is_floating_point and p.dim() > 1)
    return next(weights, None) or next(net.parameters()).dtype


SCALE = "guidance_scale"
"""Condition of a batch: the guidance scale [B] that was drawn for each sample."""


class Around:
    """A call around a network's own, which is known by what that is."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.name = getattr(call, "name", None)  # of an adapter
        self.takes_r = getattr(call, "takes_r", None)
        self.__signature__ = inspect.signature(call)


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
        # A batch has what its student is told; teachers and experts of earlier phases are asked with it too.
        if SCALE in cond and not getattr(self.call, "takes_scale", False):
            cond = {name: value for name, value in cond.items() if name != SCALE}
        x, t = x.double(), t.double()
        x_s = expand_like(self.c_in(t), x) * x
        second = {} if r is None else {"time_r": self.network_time(r.double())}
        u = self.call(self.net, x_s.to(dtype_of_layers(self.net)), self.network_time(t), cond, **second)
        if not isinstance(u, Tensor):
            raise TypeError(
                f"{type(self.net).__name__} gives a {type(u).__name__}, not a tensor: take what it predicts out of it "
                "in a function of your own: TrigFlow(net, call=lambda net, x, time, cond: net(x, time, **cond)[0])"
            )
        return expand_like(self.f_skip(t), x) * x + expand_like(self.f_out(t), x) * u.double()

    def network_time(self, t: Tensor) -> Tensor:
        return (self.time_scale * self.s_of_t(t)).float()


def radians(s: float) -> float:
    """Rectified-flow time -> TrigFlow's."""
    return math.atan2(s, 1 - s)


def level(t: float) -> float:
    """The rectified-flow time of radians: the inverse of `radians`."""
    return math.sin(t) / (math.sin(t) + math.cos(t))


ROUNDING = 1e-4  # of rectified-flow time, within which two places are one


def meet(a: float, b: float) -> bool:
    """Whether two times in radians are one, but for the digits that settings give."""
    return abs(level(a) - level(b)) <= ROUNDING


class Guided(nn.Module):
    """Classifier-free guidance: F_negative + scale (F - F_negative); a scale of 1 costs one pass only.

    Args:
        scale: None: each sample's own, its condition SCALE.
        negative: the condition of an empty or a negative prompt, each [1, ...].
        keep_norm: scale the velocity eps - x0 back to its length without guidance, for each part that `lengths` names.
        shared: conditions, such as a first frame, that the negative prompt has from the sample.
        interval: rectified-flow times between which there is guidance (Kynkaanniemi et al. 2024).
        below: a rectified-flow time, and the scale below it.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float | None,
        negative: Condition,
        keep_norm: str | None = None,
        shared: Sequence[str] = (),
        interval: tuple[float, float] = (0.0, 1.0),
        below: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.scale = scale
        self.interval = interval
        self.below = below
        self.negative = dict(negative)
        self.keep_norm = keep_norm
        self.shared = tuple(shared)

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        own = cond.get(SCALE)
        cond = {name: value for name, value in cond.items() if name != SCALE}
        F = self.model(x, t, cond)
        if self.scale == 1 and self.below is None:
            return F
        F_negative = self.model(x, t, self.without_prompt(cond, len(x)))
        guided = F_negative + self.scale_at(t, x, own) * (F - F_negative)
        if self.keep_norm is not None:
            guided = self.as_long(guided, F, x, t)
        if self.interval == (0.0, 1.0):
            return guided
        first, last = (radians(s) for s in self.interval)
        return torch.where(expand_like((t >= first) & (t <= last), x), guided, F)

    def scale_at(self, t: Tensor, x: Tensor, own: Tensor | None) -> Tensor | float:
        if self.scale is None:
            assert own is not None, "each sample brings its scale"
            return expand_like(own.double(), x)
        if self.below is None:
            return self.scale
        time, low = self.below
        return expand_like(torch.where(t < radians(time), low, self.scale).double(), x)

    def as_long(self, guided: Tensor, F: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """With the lengths of the velocity without guidance."""
        assert self.keep_norm is not None
        k, a = expand_like(t.sin() + t.cos(), x), expand_like(t.sin() - t.cos(), x)  # eps - x0 = a x + k F
        u, u_guided = a * x + k * F, a * x + k * guided
        return (u_guided * lengths(u, self.keep_norm) / lengths(u_guided, self.keep_norm) - a * x) / k

    def without_prompt(self, cond: Condition, size: int) -> dict[str, Tensor]:
        """The negative condition for `size` samples with these conditions, each [size, ...]."""
        return {**expand_condition(self.negative, size), **{name: cond[name] for name in self.shared}}


def lengths(u: Tensor, parts: str) -> Tensor:
    """L2 norms of the parts of u [B, C, ..., H, W], to multiply it with: of a "token" C x 2 x 2, or of a "row" W."""
    squares = u.square()
    if parts == "row":
        return squares.sum(-1, keepdim=True).sqrt()
    H, W = u.shape[-2:]
    patches = squares.sum(1, keepdim=True).unflatten(-1, (W // 2, 2)).unflatten(-3, (H // 2, 2))
    return patches.sum((-3, -1), keepdim=True).sqrt().expand_as(patches).flatten(-4, -3).flatten(-2)
