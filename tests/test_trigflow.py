"""Noise schedules in TrigFlow coordinates against closed forms, differences and diffusers; the wrapper itself."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from torch import Tensor, nn

import jvpgraph
from jvpgraph.trainer.model.told import WithConditions
from jvpgraph.trainer.trigflow import (
    COSINE,
    EDM,
    EDM_NETWORK,
    HALF_PI,
    PREDICTIONS,
    RECTIFIED_FLOW,
    SCHEDULES,
    TORCH,
    VP_LINEAR,
    VP_SCALED_LINEAR,
    Guided,
    Schedule,
    TrigFlow,
    add_noise,
    clean_image,
    expand_like,
    s,
    schedule,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(size: int, rng: torch.Generator) -> Tensor:
    return torch.randn(size, 1, 4, 4, generator=rng, dtype=torch.float64)


def inner_times(known: Schedule, size: int = 101) -> Tensor:
    """Times strictly inside the schedule's range, both ends nearly reached."""
    first, last = known.t_range
    return torch.linspace(first + 1e-5, last - 1e-5, size, dtype=torch.float64)


def evaluate(expression: sympy.Expr, time: Tensor) -> Tensor:
    return sympy.lambdify(s, expression, modules=[TORCH])(time) + 0 * time


def velocity(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    return expand_like(t.cos(), x0) * eps - expand_like(t.sin(), x0) * x0


def euler_number(t: Tensor) -> Tensor:
    return t.sin() + t.cos()


CLOSED_FORMS = {
    RECTIFIED_FLOW: {
        "time": lambda t: t.sin() / euler_number(t),
        "c_in": lambda t: 1 / euler_number(t),
        "c_skip": lambda t: 1 / euler_number(t),
        "c_out": lambda t: -t.sin() / euler_number(t),
    },
    RECTIFIED_FLOW.predicting("noise"): {
        "c_skip": lambda t: 1 / t.cos(),
        "c_out": lambda t: -t.tan(),
    },
    COSINE: {
        "time": lambda t: 2 * t / math.pi,
        "c_in": torch.ones_like,
        "c_skip": torch.cos,
        "c_out": lambda t: -2 / math.pi * t.sin(),
    },
    EDM: {
        "time": torch.tan,
        "c_in": lambda t: 1 / t.cos(),
        "c_skip": lambda t: 1 / t.cos(),
        "c_out": lambda t: -t.tan(),
    },
    EDM.predicting("data"): {
        "c_skip": torch.zeros_like,
        "c_out": torch.ones_like,
        "f_skip": lambda t: 1 / t.tan(),
        "f_out": lambda t: -1 / t.sin(),
    },
    # Karras et al. 2022, table 1, for an input of deviation sigma_data: D / sigma_data = c_skip x_t + c_out u
    EDM_NETWORK: {
        "time": lambda t: (0.5 * t.tan()).log() / 4,
        "c_in": torch.ones_like,
        "c_skip": torch.cos,
        "c_out": lambda t: -t.sin(),
    },
    VP_LINEAR: {
        "c_in": torch.ones_like,
        "f_skip": lambda t: -t.tan(),
        "f_out": lambda t: 1 / t.cos(),
    },
    VP_LINEAR.predicting("v"): {
        "c_skip": torch.cos,
        "c_out": lambda t: -t.sin(),
        "f_out": torch.ones_like,
    },
}
EVERY = [known.predicting(what) for known in SCHEDULES.values() for what in PREDICTIONS]


def label(known: Schedule) -> str:
    return f"{known.name}, {known.predicts}"


@pytest.mark.parametrize("known", CLOSED_FORMS, ids=label)
def test_coefficients_equal_their_closed_forms(known: Schedule) -> None:
    t = inner_times(known)
    for name, closed_form in CLOSED_FORMS[known].items():
        torch.testing.assert_close(known.coefficient(name)(t), closed_form(t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("known", SCHEDULES.values(), ids=lambda known: known.name)
def test_matched_times_have_the_same_noise_to_signal_ratio(known: Schedule) -> None:
    t = inner_times(known)
    time = known.coefficient("time")(t)
    ratio = evaluate(known.sigma, time) / evaluate(known.alpha, time)
    torch.testing.assert_close(ratio, t.tan(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("known", SCHEDULES.values(), ids=lambda known: known.name)
def test_a_velocity_is_the_derivative_of_the_path(known: Schedule) -> None:
    h, (first, last) = 1e-6, known.s_range or (0.0, 1.0)
    time = torch.tensor([first + share * (last - first) for share in (0.1, 0.5, 0.9)], dtype=torch.float64)
    for path, derivative in zip((known.alpha, known.sigma), known.predicting("velocity").prediction):
        difference = (evaluate(path, time + h) - evaluate(path, time - h)) / (2 * h)
        torch.testing.assert_close(evaluate(derivative, time), difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("known", "betas", "steps_off"),
    [
        (VP_LINEAR, {"beta_schedule": "linear"}, 4e-4),
        (VP_SCALED_LINEAR, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, 4e-5),
    ],
    ids=["linear", "scaled linear"],
)
def test_the_chain_of_ddpm_is_matched_at_every_timestep(known: Schedule, betas: dict, steps_off: float) -> None:
    """The polynomial's alpha^2 to 8e-6 of its value, a timestep from its noise level to 4e-4 of a step."""
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(1000, **betas)
    alpha2 = torch.cumprod(1 - scheduler.betas.double(), 0)
    n = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(evaluate(known.alpha, n / 1000) ** 2, alpha2, rtol=8e-6, atol=0)
    t = torch.atan2((1 - alpha2).sqrt(), alpha2.sqrt())
    torch.testing.assert_close(1000 * known.coefficient("time")(t), n, rtol=0, atol=steps_off)
    # diffusers rounds its own product to float32
    torch.testing.assert_close(
        evaluate(known.alpha, n / 1000) ** 2, scheduler.alphas_cumprod.double(), rtol=2e-5, atol=0
    )


@pytest.mark.parametrize("known", EVERY, ids=label)
def test_values_and_tangents_are_finite_at_all_times_and_right_inside(known: Schedule) -> None:
    ends = torch.tensor([0.0, 1e-12, HALF_PI - 1e-12, HALF_PI], dtype=torch.float64)
    first, last = known.t_range
    h = 1e-6
    inside = torch.linspace(first + 0.01, last - 0.01, 9, dtype=torch.float64)
    t = torch.cat([ends, inside])
    for name in ("time", "c_in", "f_skip", "f_out"):
        f = known.coefficient(name)
        value, tangent = torch.func.jvp(f, (t,), (torch.ones_like(t),))
        assert value.isfinite().all()
        assert tangent.isfinite().all()
        difference = (f(inside + h) - f(inside - h)) / (2 * h)
        torch.testing.assert_close(tangent[len(ends) :], difference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("known", [VP_LINEAR, EDM, EDM_NETWORK], ids=lambda known: known.name)
def test_beyond_its_training_a_model_stays_at_the_nearest_end(known: Schedule) -> None:
    first, last = known.s_range
    time = known.coefficient("time")(torch.tensor([0.0, HALF_PI], dtype=torch.float64))
    torch.testing.assert_close(time, torch.tensor([first, last], dtype=torch.float64), rtol=1e-6, atol=1e-6)


class Oracle(nn.Module):
    """A network in float64 that knows x0 and eps, and predicts what `known` asks of it."""

    def __init__(self, known: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.known, self.x0, self.eps, self.t = known, x0, eps, t

    def forward(self, x_s: Tensor, time: Tensor) -> Tensor:
        self.x_s, self.time = x_s, time
        a, b = (evaluate(f, self.known.coefficient("time")(self.t)) for f in self.known.prediction)
        return expand_like(a, x_s) * self.x0 + expand_like(b, x_s) * self.eps


@pytest.mark.parametrize("known", EVERY, ids=label)
def test_the_wrapper_turns_a_perfect_network_into_the_velocity(known: Schedule) -> None:
    t = torch.tensor([0.04, 0.3, 0.8, 1.2, 1.5], dtype=torch.float64)
    x0, eps = images(5, seeded(1)), images(5, seeded(2))
    net = Oracle(known, x0, eps, t)
    x = add_noise(x0, eps, t)
    F = TrigFlow(net, schedule=known, time_scale=1000)(x, t, {})
    torch.testing.assert_close(F, velocity(x0, eps, t), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(clean_image(F, x, t), x0, rtol=1e-7, atol=1e-7)
    time = known.coefficient("time")(t)
    assert net.time.dtype == torch.float32
    torch.testing.assert_close(net.time, (1000 * time).float())
    x_s = expand_like(evaluate(known.alpha, time), x) * x0 + expand_like(evaluate(known.sigma, time), x) * eps
    torch.testing.assert_close(net.x_s, x_s, rtol=1e-7, atol=1e-7)


class Small(nn.Module):
    """tanh of a linear layer of the pixels, the time and a condition."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.linear = nn.Linear(18, 16, dtype=dtype)

    def forward(self, x: Tensor, time: Tensor, hint: Tensor) -> Tensor:
        self.seen = time.dtype
        tokens = torch.cat([x.flatten(1), time[:, None].to(x) / 1000, hint.to(x)], dim=1)
        return self.linear(tokens).tanh().reshape(x.shape)


def test_the_wrapper_is_the_direct_formula_for_rectified_flow() -> None:
    net, t, x = Small(), torch.linspace(0.05, 1.5, 6, dtype=torch.float64), images(6, seeded(3))
    cond = {"hint": torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]}
    time = t.sin() / (t.sin() + t.cos())
    x_s = x / expand_like(t.sin() + t.cos(), x)
    x0 = x_s - expand_like(time, x) * net(x_s, (1000 * time).float(), **cond)
    F = TrigFlow(net, time_scale=1000)(x, t, cond)
    torch.testing.assert_close(F, (expand_like(t.cos(), x) * x - x0) / expand_like(t.sin(), x))
    torch.testing.assert_close(clean_image(F, x, t), x0)


@pytest.mark.parametrize("known", EVERY, ids=label)
def test_the_consistency_function_is_the_identity_at_time_zero(known: Schedule) -> None:
    x, t = images(4, seeded(4)), torch.zeros(4, dtype=torch.float64)
    F = TrigFlow(Small(), schedule=known)(x, t, {"hint": torch.ones(4, 1)})
    assert torch.equal(clean_image(F, x, t), x)


class Layered(nn.Module):
    """A layer, and a parameter of the network itself, which comes first among its parameters."""

    def __init__(self, own: Tensor | None = None) -> None:
        super().__init__()
        if own is not None:
            self.own = nn.Parameter(own, requires_grad=False)
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.layer((x * (1 + time[:, None, None, None])).flatten(1)).view_as(x)


@pytest.mark.parametrize("own", [torch.arange(4), torch.ones(4).bfloat16(), torch.ones(4, 4).bfloat16()])
def test_latents_have_the_dtype_of_the_layers(own: Tensor) -> None:
    """Not that of the first parameter: a table of integers cut them off, and bfloat16 rounded them."""
    net, wide = Layered(own), Layered().double()
    net.layer.load_state_dict(wide.layer.state_dict())
    x, t = images(2, seeded(1)), torch.tensor([1.2, 0.4], dtype=torch.float64)
    torch.testing.assert_close(TrigFlow(net)(x, t, {}), TrigFlow(wide)(x, t, {}), rtol=1e-5, atol=1e-5)


def test_what_is_no_tensor_is_named() -> None:
    class Pair(Layered):
        def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor]:  # type: ignore[override]
            return (super().forward(x, time),)

    with pytest.raises(TypeError, match=r"Pair gives a tuple, not a tensor: .*call=lambda"):
        TrigFlow(Pair())(images(2, seeded(1)), torch.tensor([1.2, 0.4]), {})


def test_time_stays_in_float32_for_a_narrow_network() -> None:
    net = Small(torch.bfloat16)
    F = TrigFlow(net, schedule=VP_LINEAR)(images(2, seeded(5)), torch.ones(2), {"hint": torch.ones(2, 1)})
    assert net.seen == torch.float32
    assert F.dtype == torch.float64


GRAPHS = [RECTIFIED_FLOW, COSINE, VP_LINEAR, VP_SCALED_LINEAR, VP_LINEAR.predicting("velocity"), EDM, EDM_NETWORK]


@pytest.mark.parametrize("known", GRAPHS, ids=label)
def test_a_graph_carries_the_tangent_through_the_schedule(known: Schedule) -> None:
    model = TrigFlow(Small(), schedule=known)
    x, cond = images(5, seeded(6)), {"hint": torch.ones(5, 1, dtype=torch.float64)}
    t = torch.tensor([0.0, 0.05, 0.7, 1.5, HALF_PI], dtype=torch.float64)
    tangents = {"x": images(5, seeded(7)), "t": torch.ones(5, dtype=torch.float64)}
    F, F_dot = jvpgraph.transform(model, backend="eager")(x, t, cond, tangents=tangents)
    with torch.no_grad():
        expected = torch.func.jvp(lambda x, t: model(x, t, cond), (x, t), (tangents["x"], tangents["t"]))
    torch.testing.assert_close(F, expected[0])
    torch.testing.assert_close(F_dot, expected[1])
    assert F_dot.isfinite().all()


def test_schedules_are_found_by_name() -> None:
    assert schedule("vp linear") is VP_LINEAR
    assert schedule("vp linear", predicts="v") == VP_LINEAR.predicting("v")
    with pytest.raises(ValueError, match=r"no schedule is called 'vp'; known are rectified flow, cosine, vp linear"):
        schedule("vp")
    with pytest.raises(ValueError, match=r"a model predicts one of velocity, noise, data, v, F, not 'epsilon'"):
        schedule("edm", predicts="epsilon")


def test_guidance_extrapolates_from_the_negative_condition() -> None:
    class ByHint(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            return x * expand_like(cond["hint"], x)

    x, t = images(3, seeded(8)), torch.ones(3, dtype=torch.float64)
    hint, negative = torch.tensor([1.0, 2.0, 3.0]), {"hint": torch.tensor([10.0])}
    F = Guided(ByHint(), 1.5, negative)(x, t, {"hint": hint})
    torch.testing.assert_close(F, x * expand_like(10 + 1.5 * (hint - 10), x))
    assert torch.equal(Guided(ByHint(), 1, negative)(x, t, {"hint": hint}), x * expand_like(hint, x))


class Told(nn.Module):
    """A network that is told a scale and a size."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8 + 1 + 1 + 2, 8)

    def forward(self, x: Tensor, s: Tensor, guidance: Tensor, size: Tensor) -> Tensor:
        told = [s[:, None], guidance[:, None], size]
        return torch.tanh(self.inner(torch.cat([x, *(c.to(x.dtype) for c in told)], dim=1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["op_by_op", pytest.param("inductor", marks=pytest.mark.long)])
def test_conditions_that_are_the_same_for_all(backend, dtype):
    """Are as if each sample brought them: value, tangent and gradients, at a second size."""
    torch.manual_seed(0)
    net = Told().to(dtype)
    plain = TrigFlow(net)
    told = TrigFlow(net, WithConditions(plain.call, {"guidance": 3.5, "size": [8.0, 4]}))
    dual = jvpgraph.transform(told, backend=backend)
    for batch in (3, 5):
        x, t = torch.randn(batch, 8), torch.rand(batch)
        given = {"guidance": torch.full((batch,), 3.5), "size": torch.tensor([8.0, 4.0]).expand(batch, 2)}
        answers = []
        for call, cond in ((jvpgraph.transform(plain, backend="op_by_op"), given), (dual, {})):
            inputs = x.clone().requires_grad_(), t.clone().requires_grad_()
            F, F_dot = call(*inputs, cond, tangents={"x": x.cos(), "t": t.sin()})
            answers.append([F.detach(), F_dot, *torch.autograd.grad(F.square().sum(), [*inputs, *net.parameters()])])
        eps = 1e-5 if dtype == torch.float32 else 2e-2
        for right, found in zip(*answers, strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=eps * right.abs().max().item())
