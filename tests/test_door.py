"""What comes through the front door: functions made anew at each step, models that change, containers of any kind."""

from __future__ import annotations

import dataclasses
import functools
import gc
import types
import warnings
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

import jvpgraph
from jvpgraph.functions import identity
from jvpgraph.tree import leaves, map_leaves
from jvpgraph.unguarded import modules_of, unguarded

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


# ------------------------------------------------------------------------------- functions made anew at each step


class Sampler:
    def __init__(self, net: nn.Module, batch: Tensor):
        self.net, self.batch = net, batch

    def velocity(self, z: Tensor) -> Tensor:
        return self.net(z) * self.batch

    __call__ = velocity


def scaled(z: Tensor, net: nn.Module, *, batch: Tensor) -> Tensor:
    return net(z) * batch


def with_defaults(net: nn.Module, batch: Tensor) -> Callable[..., Any]:
    def velocity(z: Tensor, by: Tensor = batch, *, plus: Tensor = batch) -> Tensor:
        return net(z) * by + plus

    return velocity


def with_inner(net: nn.Module, batch: Tensor) -> Callable[..., Any]:
    def inner(x: Tensor) -> Tensor:
        return x * batch

    return lambda z: inner(net(z))


def with_a_cell_that_changes(net: nn.Module, batch: Tensor) -> Callable[..., Any]:
    held = batch * 0
    velocity = lambda z: net(z) * held  # noqa: E731
    held = batch
    return velocity


def in_another_net(net: nn.Module, batch: Tensor) -> Callable[..., Any]:
    """The network is another object each time, of the same parameters."""
    other = nn.Linear(4, 4)
    other._parameters = net._parameters
    return lambda z: other(z) * batch


MADE = {
    "lambda": lambda net, batch: lambda z: net(z) * batch,
    "list": lambda net, batch: (lambda held: lambda z: net(z) * held[0] + held[1])([batch, batch.detach() * 2]),
    "dict": lambda net, batch: (lambda held: lambda z: net(z) * held["a"]["b"])({"a": {"b": batch}}),
    "partial": lambda net, batch: functools.partial(scaled, net=net, batch=batch),
    "bound method": lambda net, batch: Sampler(net, batch).velocity,
    "callable object": Sampler,
    "defaults": with_defaults,
    "nested": with_inner,
    "cell": with_a_cell_that_changes,
    "another net": in_another_net,
    "decorated": lambda net, batch: functools.wraps(scaled)(lambda z: scaled(z, net, batch=batch)),
}


def check_functions(make: Callable[..., Any], backend: str, steps: int = 4) -> tuple[int, int]:
    """Each step is right, with gradients; (functions and batches that are alive afterwards, graphs)."""
    net, made, before = nn.Linear(4, 4), [], counters["stats"]["unique_graphs"]
    for _ in range(steps):
        batch = torch.randn(3, 4).requires_grad_()
        z, z_dot = torch.randn(2, 3, 4)
        z.requires_grad_()
        fn = make(net, batch)
        got, wanted = jvpgraph.jvp(fn, (z,), (z_dot,), backend=backend), torch.func.jvp(fn, (z,), (z_dot,))
        assert_close(got, wanted, **CLOSE)
        assert not got[1].requires_grad
        where = [batch, z, *net.parameters()]
        assert_close(*(torch.autograd.grad(y.square().sum(), where) for y, _ in (got, wanted)), **CLOSE)
        made += [weakref.ref(batch)] + [weakref.ref(fn)] * (not isinstance(fn, types.MethodType))
        del fn, batch, got, wanted, where
    gc.collect()
    return sum(reference() is not None for reference in made), counters["stats"]["unique_graphs"] - before


@pytest.mark.slow
@pytest.mark.parametrize("how", MADE)
def test_functions_of_the_same_code_share_a_graph_and_none_is_kept(how):
    assert check_functions(MADE[how], "eager") == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lambda", "partial"])
def test_by_default_too(how):
    assert check_functions(MADE[how], "inductor") == (0, 1)


@pytest.mark.slow
def test_op_by_op_nothing_is_kept():
    assert check_functions(MADE["lambda"], "op_by_op") == (0, 0)


@pytest.mark.slow
def test_the_network_of_a_function_is_not_kept():
    net = nn.Linear(4, 4)
    reference = weakref.ref(net)
    x = torch.randn(3, 4)
    jvpgraph.jvp(with_defaults(net, x), (x,), (x,), backend="eager")
    jvpgraph.jvp(net, (x,), (x,), backend="eager")
    del net
    gc.collect()
    assert reference() is None


@pytest.mark.filterwarnings("ignore:jvpgraph.jvp compiled the function:RuntimeWarning")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_numbers_in_a_closure_count(backend):
    x, x_dot = torch.randn(2, 5)

    def make(n: Any) -> Callable[..., Any]:
        return lambda z: z.sin() * n

    for n in (2, 3, 7, 0.5, -1.5, True):
        assert_close(jvpgraph.jvp(make(n), (x,), (x_dot,), backend=backend), (x.sin() * n, x_dot * x.cos() * n))


def test_a_global_that_changes(monkeypatch):
    x, x_dot = torch.randn(2, 5)
    for batch in torch.randn(3, 5):
        monkeypatch.setitem(globals(), "SHIFT", batch)
        got = jvpgraph.jvp(lambda z: z.sin() * SHIFT, (x,), (x_dot,), backend="eager")  # noqa: F821
        assert_close(got, (x.sin() * batch, x_dot * x.cos() * batch))


def test_equal_code_of_other_globals_is_another_function():
    code, found = compile("f = lambda z: z * SCALE", "<somewhere>", "exec").co_consts[0], []
    for scale in (2.0, 5.0):
        fn = types.FunctionType(code, {"SCALE": scale})
        found.append(identity(fn))
        x = torch.ones(3)
        assert_close(jvpgraph.jvp(fn, (x,), (x,), backend="op_by_op"), (x * scale, x * scale))
    assert found[0] != found[1]


@pytest.mark.parametrize("backend", ["eager", "op_by_op"])
def test_a_closure_that_carries_a_tangent_is_refused(backend):
    net, x = nn.Linear(4, 4), torch.randn(3, 4)
    with forward_ad.dual_level():
        batch = forward_ad.make_dual(x, x)
        for how in ("lambda", "dict", "partial", "bound method", "callable object", "nested"):
            with pytest.raises(ValueError, match="forward_ad"):
                jvpgraph.jvp(MADE[how](net, batch), (x,), (x,), backend=backend)


def test_a_primal_that_the_closure_holds_too_is_active_as_a_primal_only():
    x, x_dot = torch.randn(2, 5)
    assert_close(jvpgraph.jvp(lambda z: z * x, (x,), (x_dot,), backend="eager"), (x * x, x_dot * x))


@pytest.mark.slow
def test_the_third_recompilation_of_a_line_is_said_once():
    x = torch.randn(3)

    def step(name: str) -> Any:
        return jvpgraph.jvp(lambda z: z * len(name), (x,), (x,), backend="eager")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for n in range(3):
            step("a" * n)
        assert not said
        for n in range(3, 12):  # and the recompile limit is no end of it
            assert_close(step("a" * n)[1], x * n)
    assert [w.category for w in said] == [RuntimeWarning]
    assert "test_door.py" in str(said[0].message)


def test_a_hook_on_a_network_in_a_closure_is_noticed():
    net, x = nn.Linear(4, 4), torch.randn(3, 4)
    run = lambda: jvpgraph.jvp(lambda z: net(z).sin(), (x,), (x,), backend="eager")  # noqa: E731
    run()
    net.register_forward_hook(lambda _module, _args, out: out * 3)
    assert_close(run(), torch.func.jvp(lambda z: net(z).sin(), (x,), (x,)), **CLOSE)
    assert modules_of(functools.partial(lambda a, b: a, [net])) == [net]


# ----------------------------------------------------------------------- models that change after the first call


class Processor:
    """A plain object, as diffusers' attention processors are."""

    gain = 1.0

    def __call__(self, part: Part, x: Tensor) -> Tensor:
        return self.scaled(part.lin(x))

    def scaled(self, x: Tensor) -> Tensor:
        return self.gain * x


class LoudProcessor(Processor):
    def scaled(self, x: Tensor) -> Tensor:
        return 3 * x


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act, self.loud, self.options = nn.Linear(4, 4), nn.Tanh(), False, {"times": 1}
        self.processor = Processor()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.processor(self, x)) * self.options["times"]
        return self.finish(3 * x if self.loud else x)

    def finish(self, x: Tensor) -> Tensor:
        return x


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts, self.head = nn.ModuleList([Part(), Part()]), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return self.head(x)


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


class Louder(Part):
    def forward(self, x: Tensor) -> Tensor:
        return 5 * super().forward(x)


def tripled(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
    return 3 * out


def tripled_input(_module: nn.Module, args: Any) -> Any:
    return (3 * args[0],)


def with_its_forward_replaced(model: Whole) -> None:
    own = model.parts[0].forward
    model.parts[0].forward = lambda x: 4 * own(x)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook": lambda m: m.parts[0].register_forward_hook(tripled),
    "hook inside": lambda m: m.parts[0].lin.register_forward_hook(tripled),
    "pre-hook inside": lambda m: m.parts[1].lin.register_forward_pre_hook(tripled_input),
    "hook of the model": lambda m: m.register_forward_hook(tripled),
    "global hook": lambda m: nn.modules.module.register_module_forward_hook(
        lambda module, args, out: 3 * out if isinstance(module, nn.Linear) else None
    ),
    "global pre-hook": lambda m: nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: (3 * args[0],) if isinstance(module, nn.Linear) else None
    ),
    "parametrization": lambda m: parametrize.register_parametrization(m.parts[0].lin, "weight", Doubled()),
    "submodule": lambda m: setattr(m.parts[0], "act", nn.ReLU()),
    "submodule of the same class": lambda m: setattr(m.parts[0], "lin", nn.Linear(4, 4)),
    "block": lambda m: m.parts.__setitem__(1, Louder()),
    "one more block": lambda m: m.parts.append(Part()),
    "class": lambda m: setattr(m.parts[0], "__class__", Louder),
    "attribute": lambda m: setattr(m.parts[0], "loud", True),
    "option": lambda m: m.parts[0].options.update(times=2),
    "forward": with_its_forward_replaced,
    "number of a processor": lambda m: setattr(m.parts[0].processor, "gain", 1.5),
    "method of a processor's class": lambda m: setattr(Processor, "scaled", LoudProcessor.scaled),
    "code of a method": lambda m: setattr(Processor.scaled, "__code__", LoudProcessor.scaled.__code__),
    "method of the class": lambda m: setattr(Part, "finish", lambda self, x: 7 * x),
    "forward of the class": lambda m: setattr(Part, "forward", Louder.forward_of_its_own),  # type: ignore[attr-defined]
}
Louder.forward_of_its_own = lambda self, x: self.lin(x).sin()  # type: ignore[attr-defined]


def disagreement(dual: Any, x: Tensor, x_dot: Tensor) -> None:
    """Value, tangent and gradients are those of the model as it is now."""
    model = dual.model
    y, y_dot = dual(x, tangents={"x": x_dot})
    wanted, wanted_dot = torch.func.jvp(model, (x,), (x_dot,))
    assert_close((y, y_dot), (wanted, wanted_dot), **CLOSE)
    assert_close(dual(x), y, **CLOSE)
    mine, own = (torch.autograd.grad(out.sum(), list(model.parameters()), allow_unused=True) for out in (y, model(x)))
    assert_close(list(mine), list(own), **CLOSE)


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("regions", [None, Part], ids=["one graph", "regions"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_the_first_call_is_noticed(change, regions, monkeypatch):
    for name in ("forward", "finish"):  # put back afterwards
        monkeypatch.setattr(Part, name, vars(Part)[name])
    monkeypatch.setattr(Processor, "scaled", Processor.scaled)
    monkeypatch.setattr(Processor.scaled, "__code__", Processor.scaled.__code__)
    dual = jvpgraph.transform(Whole(), backend="eager", regions=regions)
    x, x_dot = torch.randn(2, 3, 4)
    disagreement(dual, x, x_dot)
    handle = CHANGES[change](dual.model)
    try:
        disagreement(dual, x, x_dot)
    finally:
        if change.startswith("global"):
            handle.remove()
    if change in ("hook", "hook inside", "global hook"):
        handle.remove()
        disagreement(dual, x, x_dot)


@pytest.mark.long
def test_by_default_a_hook_is_noticed():
    dual = jvpgraph.transform(Whole())
    x, x_dot = torch.randn(2, 3, 4)
    disagreement(dual, x, x_dot)
    dual.parts[0].lin.register_forward_hook(tripled)
    disagreement(dual, x, x_dot)


@pytest.mark.parametrize("regions", [None, Part], ids=["one graph", "regions"])
def test_what_changes_nothing_compiles_nothing(regions):
    model = Whole()
    dual = jvpgraph.transform(model, backend="eager", regions=regions)
    x, x_dot = torch.randn(2, 3, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dual(x, tangents={"x": x_dot})[0].sum().backward()
    graphs = len(dual.reports)
    optimizer.step()
    optimizer.zero_grad()
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    model.parts[0].loud = model.parts[0].loud
    type(model).__doc__ = "Read by nobody."
    model.parts[0].register_forward_hook(tripled).remove()
    disagreement(dual, x, x_dot)
    with ModuleTracker():
        dual(x, tangents={"x": x_dot})
    assert len(dual.reports) == graphs


def test_what_dynamo_takes_for_granted():
    model = Whole()
    before = unguarded([model])
    assert before == unguarded([model])
    assert hash(before) == hash(unguarded([Whole()]))
    assert before != unguarded([nn.Sequential(model)])


def test_what_fsdp_holds_during_an_update_is_no_change():
    """It let everything be compiled again for each batch of a gradient that is accumulated."""
    model = Whole()
    before = unguarded([model])
    model.state = FSDPParamGroup.__new__(FSDPParamGroup)
    assert before == unguarded([model])
    model.state = Fraction(1, 2)  # any other object with methods is one
    assert before != unguarded([model])


def test_a_method_of_what_a_function_is_bound_to_is_noticed(monkeypatch):
    processor, part, x = Processor(), Part(), torch.randn(3, 4)
    run = lambda: jvpgraph.jvp(lambda z: processor(part, z), (x,), (x,), backend="eager")  # noqa: E731
    run()
    monkeypatch.setattr(Processor, "scaled", LoudProcessor.scaled)
    assert_close(run(), torch.func.jvp(lambda z: processor(part, z), (x,), (x,)), **CLOSE)


# ------------------------------------------------------------------------------ where torch.compile stands aside

ASIDE: dict[str, Callable[[], Any]] = {
    "counter": lambda: FlopCounterMode(display=False),
    "tracker": ModuleTracker,  # which Dynamo cannot trace
    "force_eager": lambda: torch.compiler.set_stance("force_eager"),
    "eager_on_recompile": lambda: torch.compiler.set_stance("eager_on_recompile"),
    "switched off": lambda: torch._dynamo.config.patch(disable=True),
}


@pytest.mark.parametrize("regions", [None, Part], ids=["one graph", "regions"])
@pytest.mark.parametrize("aside", ASIDE)
def test_where_nothing_is_compiled_a_call_runs_op_by_op(aside, regions):
    dual = jvpgraph.transform(Whole(), backend="eager", regions=regions)
    x, x_dot = torch.randn(2, 3, 4)
    wanted = torch.func.jvp(dual.model, (x,), (x_dot,))
    for _ in range(2):
        with ASIDE[aside]():
            assert_close(dual(x, tangents={"x": x_dot}), wanted, **CLOSE)
    assert_close(dual(x, tangents={"x": x_dot}), wanted, **CLOSE)
    assert len(dual.reports) >= 1


def test_a_counter_counts_by_default_and_no_gradients_of_tangents_are_lost():
    x = torch.randn(3, 4)
    with FlopCounterMode(display=False) as counter:
        jvpgraph.transform(nn.Linear(4, 4))(x, tangents={"input": x})
        with pytest.raises(jvpgraph.CaptureError, match="FlopCounterMode, makes no graph"):
            jvpgraph.transform(nn.Linear(4, 4), differentiable_tangent=True)(x, tangents={"input": x})
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 4


@pytest.mark.parametrize(
    ("fn", "settings", "remedy", "untrue"),
    [
        (lambda x: x * 2 if x.sum() > 0 else x, {}, 'regions="auto"', 'backend="eager"'),
        (lambda x: x * 2 if x.sum() > 0 else x, {"differentiable_tangent": True}, "cannot be run", "regions"),
        (lambda x: x * x.floor_divide(0.3), {}, "no_grad", 'backend="eager"'),
    ],
    ids=["branches", "branches, with gradients of tangents", "no backward"],
)
def test_a_remedy_is_not_what_was_asked_for(fn, settings, remedy, untrue):
    x = torch.randn(3).requires_grad_()
    with pytest.raises(jvpgraph.CaptureError) as error, torch.autograd.set_detect_anomaly(False):
        jvpgraph.jvp(fn, (x,), (x,), backend="eager", **settings)
    last = str(error.value).splitlines()[-1]
    assert remedy in last
    assert untrue not in last


@pytest.mark.parametrize("settings", [{"backend": "op_by_op"}, {"backend": "eager", "regions": "auto"}], ids=str)
def test_module_hooks_of_the_backward_are_not_for_graphs(settings):
    model, x = Whole(), torch.randn(3, 4)
    model.parts[0].lin.register_full_backward_hook(lambda _module, grads, _out: (3 * grads[0],))
    with pytest.raises(jvpgraph.CaptureError, match=r'backwards hooks(.|\n)*Use transform\(model, regions="auto"'):
        jvpgraph.transform(model, backend="eager")(x, tangents={"x": x})
    x.requires_grad_()
    y, y_dot = jvpgraph.transform(model, **settings)(x, tangents={"x": x.detach()})
    assert_close(y_dot, torch.func.jvp(model.forward, (x,), (x,))[1], **CLOSE)
    assert_close(*(torch.autograd.grad(out.sum(), x) for out in (y, model(x))), **CLOSE)


# -------------------------------------------------------------------------------------- containers of any kind


class Own(dict):
    """A mapping whose constructor takes something else."""

    def __init__(self, a: Any, b: Any):
        super().__init__(a=a, b=b)


class Holder:
    def __init__(self, a: Tensor):
        self.a = a


class Slots:
    __slots__ = ("a",)

    def __init__(self, a: Tensor):
        self.a = a


class Row(tuple):
    pass


@dataclasses.dataclass
class Derived:
    a: Tensor
    size: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.size = self.a.square().mean()


class Model(nn.Module):
    def __init__(self, shape: Callable[[Tensor], Any]):
        super().__init__()
        self.shape, self.gain = shape, nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Any:
        return self.shape((x * self.gain).sin())


class Around(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, *rest: Any) -> Any:
        return self.model(x * 1, *rest)


def transformed(model: nn.Module, way: str) -> Any:
    if way == "regions":
        return jvpgraph.transform(Around(model), backend="eager", regions=type(model))
    return jvpgraph.transform(model, backend=way)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "torch.return_types": lambda y: {"found": y.max(0)},
    "deque": lambda y: deque([y, 2 * y], maxlen=3),
    "OrderedDict": lambda y: OrderedDict(a=y),
    "defaultdict": lambda y: defaultdict(list, a=y),
    "dict subclass": lambda y: Own(y, [2 * y]),
    "tuple subclass": lambda y: Row((y, 2 * y)),
    "mapping proxy": lambda y: types.MappingProxyType({"a": y}),
    "computed field": lambda y: Derived(y),
    "with other things": lambda y: (y, "label", y.shape, torch.float32, slice(1)),
}


@pytest.mark.parametrize("way", ["op_by_op", "eager", "regions"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_keep_their_type_and_have_their_tangents(kind, way):
    dual = transformed(Model(OUTPUTS[kind]), way)
    x, x_dot = torch.randn(2, 3, 4)
    out, out_dot = dual(x, tangents={"x": x_dot})
    wanted = torch.func.jvp(lambda x: tensors(dual.model(x)), (x,), (x_dot,))
    assert type(out_dot) is type(out) is type(dual.model(x))
    assert_close((tensors(out), tensors(out_dot)), wanted, **CLOSE)
    if kind == "torch.return_types":
        assert type(out_dot["found"]) is torch.return_types.max
        assert out_dot["found"].indices is None
        assert_close(out_dot["found"].values, wanted[1][0], **CLOSE)


@pytest.mark.slow
def test_by_default_outputs_keep_their_type():
    dual = jvpgraph.transform(Model(lambda y: deque([y.max(0), Own(y, 2 * y)])))
    x, x_dot = torch.randn(2, 3, 4)
    out, out_dot = dual(x, tangents={"x": x_dot})
    assert type(out_dot[0]) is torch.return_types.max
    assert type(out_dot[1]) is Own
    wanted = torch.func.jvp(lambda x: tensors(dual.model(x)), (x,), (x_dot,))
    assert_close((tensors(out), tensors(out_dot)), wanted, **CLOSE)


HIDING: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "object": (Holder, "a Holder that holds tensors"),
    "object in a list": (lambda y: [y, {"b": Holder(y)}], "'1.b' is a Holder"),
    "slots": (Slots, "a Slots that holds tensors"),
    "set": (lambda y: {y, 2 * y}, "a set of tensors"),
    "distribution": (lambda y: torch.distributions.Normal(y, 1.0, validate_args=False), "a Normal"),
    "function": (lambda y: lambda: y, "a function that holds tensors"),
    "iterator": (lambda y: map(torch.sin, [y]), "computed when it is read"),
}


@pytest.mark.parametrize("way", ["op_by_op", "eager", "regions"])
@pytest.mark.parametrize("kind", HIDING)
def test_tensors_whose_tangents_have_no_place_are_refused(kind, way):
    shape, said = HIDING[kind]
    x = torch.randn(3, 4)
    with pytest.raises((ValueError, jvpgraph.CaptureError), match=said):
        transformed(Model(shape), way)(x, tangents={"x": x})


@pytest.mark.parametrize("backend", ["op_by_op", "eager"])
def test_an_array_of_numpys_is_refused(backend):
    """numpy's functions are traced, so that the array depends on what has a tangent."""
    x = torch.randn(3)
    for fn in (np.sin, lambda x: (x, x.numpy() * 2)):
        with pytest.raises((ValueError, jvpgraph.UnsupportedOp), match=r"ndarray|__array__|numpy"):
            jvpgraph.jvp(fn, (x,), (x,), backend=backend)


@pytest.mark.parametrize("backend", ["op_by_op", "eager"])
def test_the_fast_path_of_transformers(backend):
    """Op by op takes the ordinary one; a graph says how to switch it off."""
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    dual, (x, x_dot) = jvpgraph.transform(net, backend=backend), torch.randn(2, 1, 3, 8)
    with torch.no_grad():
        if backend == "op_by_op":
            assert dual(x, tangents={"src": x_dot})[1].abs().sum() > 0
        else:
            with pytest.raises(jvpgraph.UnsupportedOp, match=r"torch.backends.mha.set_fastpath_enabled\(False\)"):
                dual(x, tangents={"src": x_dot})


def test_inside_a_model_a_region_may_hand_on_an_object():
    """Its parts run op by op then, where an object is only an object."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(Holder)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x * 1).a.exp()

    dual = jvpgraph.transform(Reader(), backend="eager", regions=Model)
    x, x_dot = torch.randn(2, 3, 4)
    assert_close(dual(x, tangents={"x": x_dot}), torch.func.jvp(dual.model, (x,), (x_dot,)), **CLOSE)


class Conditional(nn.Module):
    def forward(self, x: Tensor, cond: Any) -> Tensor:
        return x.sin() * (cond[0] if isinstance(cond, deque) else cond["a"])


ARGUMENTS: dict[str, Callable[[Tensor], Any]] = {
    "defaultdict": lambda c: defaultdict(list, a=c),
    "OrderedDict": lambda c: OrderedDict(a=c),
    "dict subclass": lambda c: Own(c, 2),
    "UserDict": lambda c: UserDict(a=c),
    "mapping proxy": lambda c: types.MappingProxyType({"a": c}),
    "deque": lambda c: deque([c]),
}


@pytest.mark.parametrize("way", ["op_by_op", "eager", "regions"])
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_containers_as_arguments_with_and_without_tangents(kind, way):
    x, x_dot, c, c_dot = torch.randn(4, 3, 4)
    dual = transformed(Conditional(), way)
    cond = ARGUMENTS[kind](c)
    name = {"regions": "rest.0"}.get(way, "cond") + (".0" if kind == "deque" else ".a")
    _, dot = dual(x, cond, tangents={"x": x_dot})
    assert_close(dot, x_dot * x.cos() * c, **CLOSE)
    _, dot = dual(x, cond, tangents={"x": x_dot, name: c_dot})
    assert_close(dot, x_dot * x.cos() * c + x.sin() * c_dot, **CLOSE)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_tokenizers_output_as_an_argument(backend):
    encoding = pytest.importorskip("transformers").BatchEncoding
    x, x_dot, c, c_dot = torch.randn(4, 3, 4)
    dual = jvpgraph.transform(Conditional(), backend=backend)
    cond = encoding({"a": c, "ids": torch.arange(3)})
    assert_close(dual(x, cond, tangents={"x": x_dot})[1], x_dot * x.cos() * c, **CLOSE)
    _, dot = dual(x, cond, tangents={"x": x_dot, "cond": {"a": c_dot}})
    assert_close(dot, x_dot * x.cos() * c + x.sin() * c_dot, **CLOSE)


def test_only_what_is_replaced_is_made_anew():
    tree = {"a": [1, 2], "b": Own(3, (4,))}
    assert map_leaves(tree, lambda path, leaf: leaf + 10, only={"a.1"}) == {"a": [1, 12], "b": {"a": 3, "b": (4,)}}
    assert map_leaves(tree, lambda path, leaf: leaf, only={"a.1"})["b"] is tree["b"]
    assert map_leaves(tree, lambda path, leaf: leaf, only=()) is tree
