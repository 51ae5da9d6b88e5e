"""Several tangents in one call: each is what a call of its own gives, and the primal is computed once."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import jvpgraph
from jvpgraph.kernels.attention import attention
from jvpgraph.kernels.block_mask import BlockMask
from jvpgraph.kernels.ops import OPS

T = 3
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2}


def close(found: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> None:
    """To the rounding of the model's dtype, of the largest entry; without one, of the dtype found."""
    error = (found.double() - right.double()).abs().max()
    assert error <= TOLERANCE[dtype or found.dtype] * max(1, right.abs().max()), error


class Block(nn.Module):
    """Patches by a strided convolution, modulated attention and an MLP, and an output that is no tensor's alone."""

    def __init__(self, dim: int = 16):
        super().__init__()
        self.patches, self.norm = nn.Conv1d(4, dim, 2, 2), nn.LayerNorm(dim)
        self.qkv, self.out, self.mlp = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = self.patches(x).transpose(1, 2)
        batch, length, dim = h.shape
        q, k, v = self.qkv(self.norm(h)).view(batch, length, 3, 2, dim // 2).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, dim))
        return F.gelu(self.mlp(h)) * t.sin()[:, None, None], {"mean": h.mean(), "time": t + 1}


def inputs_of(length: int, count: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    given = {"x": torch.randn(2, 4, length, dtype=dtype), "t": torch.rand(2, dtype=dtype)}
    return given, {name: torch.randn(count, *x.shape, dtype=dtype) for name, x in given.items()}


def check(model: nn.Module, dual: jvpgraph.DualModule, length: int, count: int, dtype: torch.dtype) -> None:
    """Values, tangents and gradients against torch.func.jvp and autograd in float64."""
    given, dots = inputs_of(length, count, dtype)
    model.zero_grad()
    out, out_dots = dual(**{name: x.requires_grad_() for name, x in given.items()}, tangents=dots)
    sum(x.square().sum() for x in tree_leaves(out)).backward()
    exact = Block().double()
    exact.load_state_dict(model.state_dict())
    wide = [x.detach().double().requires_grad_() for x in given.values()]
    right = exact(*wide)
    sum(x.square().sum() for x in tree_leaves(right)).backward()
    for a, b in zip([*model.parameters(), *given.values()], [*exact.parameters(), *wide]):
        close(a.grad, b.grad)
    wide = [x.detach() for x in wide]
    for t in range(count):
        with sdpa_kernel(SDPBackend.MATH):
            _, right_dots = torch.func.jvp(exact, tuple(wide), tuple(dot[t].double() for dot in dots.values()))
        for a, b in zip(tree_leaves(out_dots), tree_leaves(right_dots)):
            assert a.shape == (count, *b.shape)
            assert a.is_contiguous()
            close(a[t], b, dtype)


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, True), (torch.float32, None)])
def test_a_network_on_the_default_backend(dtype, dynamic):
    """With gradients of the value, and at a second size."""
    model = Block().to(dtype)
    dual = jvpgraph.transform(model, tangents_batched=True, dynamic=dynamic)
    check(model, dual, 16, T, dtype)
    check(model, dual, 12, T, dtype)


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_network_in_a_graph(dynamic):
    model = Block().double()
    dual = jvpgraph.transform(model, backend="eager", tangents_batched=T, dynamic=dynamic)
    check(model, dual, 16, T, torch.float64)
    check(model, dual, 8, T, torch.float64)


@pytest.mark.long
def test_any_number_of_tangents():
    model = Block().double()
    dual = jvpgraph.transform(model, backend="eager", tangents_batched=True)
    for count in (3, 1, 2):
        check(model, dual, 8, count, torch.float64)


def test_the_primal_is_computed_once():
    model = Block()
    dual = jvpgraph.transform(model, backend="eager", tangents_batched=T, config=jvpgraph.Config(keep_graphs=True))
    given, dots = inputs_of(8, T, torch.float32)
    with torch.no_grad():
        dual(**given, tangents=dots)
    (report,) = dual.reports
    assert report.graphs[-1].text.count(f"{OPS.attention_jvps.default}") == 1
    assert report.tangent_flops == T * flops_of_one(model)


def flops_of_one(model: nn.Module) -> object:
    """Of one tangent."""
    dual = jvpgraph.transform(model, backend="eager")
    given, dots = inputs_of(8, 1, torch.float32)
    with torch.no_grad():
        dual(**given, tangents={name: dot[0] for name, dot in dots.items()})
    return dual.reports[0].tangent_flops


OFFSETS = torch.tensor([0, 3, 8], dtype=torch.int32)
LINEAR = nn.Linear(16, 16).double()
NORM = nn.BatchNorm1d(4).double()


def packed(x: Tensor) -> Tensor:
    q = x.reshape(1, 1, 8, 16)
    return attention(q, q, q, cu_seqlens_q=OFFSETS, cu_seqlens_kv=OFFSETS)[0]


def written_to(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = x[:, 1] * 2
    return y.mul_(x)


def complex_rotation(x: Tensor) -> Tensor:
    turn = torch.polar(torch.ones(8, dtype=x.dtype), torch.arange(8, dtype=x.dtype))
    return torch.view_as_real(torch.view_as_complex(x.reshape(2, 4, 8, 2)) * turn)


FUNCTIONS = {
    "attention with a bias that is active": lambda x: F.scaled_dot_product_attention(
        x[:, None], x[:, None], x[:, None], (x @ x.mT)[:, None]
    ),
    "packed attention": packed,
    "attention by hand": lambda x: (x @ x.mT / 4).softmax(-1) @ x,
    "checkpoint": lambda x: checkpoint(lambda h: LINEAR(h).relu(), x, use_reentrant=False),
    "norms": lambda x: NORM(x) + F.group_norm(x, 2) + F.layer_norm(x, (16,)) + F.rms_norm(x, (16,)),
    "writes": written_to,
    "memory": lambda x: x.as_strided((2, 2, 8), (64, 32, 2)).sin(),
    "complex": complex_rotation,
    "fft": lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2),
    "scans": lambda x: x.cumsum(-1).cumprod(1),
    "order": lambda x: x.sort(-1)[0][:, :2] + x.topk(2, dim=1)[0],
    "no rule of functorch's": lambda x: torch.linalg.inv(x[:, :, :4]),
    "a size that is data": lambda x: x[x > 0],
    "random": lambda x: F.dropout(x, 0.5) * torch.rand_like(x),
    "scatter": lambda x: torch.zeros_like(x).scatter_add(1, torch.zeros(2, 4, 16, dtype=torch.long), x),
    "views and constants": lambda x: (x, x.view(-1), torch.ones(3)),
    "images": lambda x: F.interpolate(x[..., None].expand(-1, -1, -1, 4), scale_factor=2, mode="bilinear"),
}


@pytest.mark.parametrize("differentiable", [False, True], ids=["", "differentiable"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_is_a_call_of_its_own(name, differentiable):
    how = {"backend": "eager", "differentiable_tangent": differentiable}
    x, dots = torch.randn(2, 4, 16, dtype=torch.float64), torch.randn(T, 2, 4, 16, dtype=torch.float64)
    torch.manual_seed(1)
    out, out_dots = jvpgraph.jvp(FUNCTIONS[name], (x,), (dots,), tangents_batched=T, **how)
    for t in range(T):
        torch.manual_seed(1)
        alone = jvpgraph.jvp(FUNCTIONS[name], (x,), (dots[t],), **how)
        for a, b in zip(tree_leaves(out), tree_leaves(alone[0])):
            close(a, b)
        for a, b in zip(tree_leaves(out_dots), tree_leaves(alone[1])):
            assert a.shape == (T, *b.shape)
            close(a[t], b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", ["", "window", "bias", "sequences", "tiles"])
def test_the_op_is_one_of_each(masked, dtype):
    """With grouped heads, with tangents of some operands only, and with rows that see no key."""
    torch.manual_seed(0)
    batch = 1 if masked == "sequences" else 2
    q, k, v = (torch.randn(batch, heads, 20, 8).to(dtype) for heads in (4, 2, 2))
    bias = torch.randn(4, 20, 20).to(dtype) if masked == "bias" else None
    tiles = BlockMask.of(lambda b, h, q, k: (k // 5 <= q // 5) & (q != 3), 20, 20, tile=(8, 4))
    how = {
        "window": {"window": (3, 2), "is_causal": True},
        "sequences": {f"cu_seqlens_{x}": torch.tensor([0, 3, 17], dtype=torch.int32) for x in ("q", "kv")},
        "tiles": {"block_map": tiles.map, "partial_blocks": tiles.partial},
    }.get(masked, {})
    for active in ((1, 1, 1), (1, 0, 0), (0, 0, 1)):
        dots = [torch.randn(T, *x.shape).to(dtype) if is_active else None for x, is_active in zip((q, k, v), active)]
        bias_dot = None if bias is None else torch.randn(T, *bias.shape).to(dtype)
        o, lse, o_dots, lse_dots = OPS.attention_jvps(q, k, v, *dots, bias, bias_dot, **how)
        for t in range(T):
            one = [None if x is None else x[t] for x in (*dots, bias_dot)]
            alone = OPS.attention_jvp(q, k, v, *one[:3], bias, one[3], **how)
            for a, b in zip((o, lse, o_dots[t], lse_dots[t]), alone):
                finite = b.isfinite()
                assert torch.equal(a[~finite], b[~finite])
                close(a[finite], b[finite])


@pytest.mark.slow
def test_gradients_of_several_tangents():
    """d / dW of a sum over tangents, as reverse mode over torch.func.jvp gives it."""
    torch.manual_seed(0)
    w, x, dots = (torch.randn(size, dtype=torch.float64) for size in ((8, 8), (2, 1, 4, 8), (T, 2, 1, 4, 8)))

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x @ w, x, x @ w.sin())

    found, wanted = w.clone().requires_grad_(), w.clone().requires_grad_()
    _, out_dots = jvpgraph.jvp(fn, (x, found), (dots, None), tangents_batched=T, differentiable_tangent=True)
    out_dots.square().sum().backward()
    with sdpa_kernel(SDPBackend.MATH):
        sum(torch.func.jvp(lambda x: fn(x, wanted), (x,), (dot,))[1].square().sum() for dot in dots).backward()
    close(found.grad, wanted.grad)


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("how", [{}, {"backend": "eager", "differentiable_tangent": True}])
def test_vmap_over_tangents_is_one_call(how):
    """Along any dim, beside tangents that it does not run over, and outside of it the value has gradients."""
    linear = nn.Linear(5, 5).double()
    x, s, dots = torch.randn(3, 5).double(), torch.tensor(2.0).double(), torch.randn(3, T, 5).double()

    def fn(x: Tensor, s: Tensor) -> Tensor:
        return (linear(x).sin() * s).cumsum(-1)

    def one(dot: Tensor) -> tuple[Tensor, Tensor]:
        return jvpgraph.jvp(fn, (x, s), (dot, torch.ones_like(s)), **how)

    out, out_dots = torch.func.vmap(one, in_dims=1, out_dims=(0, 1))(dots)
    for t in range(T):
        right, right_dot = torch.func.jvp(fn, (x, s), (dots[:, t], torch.ones_like(s)))
        close(out[t], right)
        close(out_dots[:, t], right_dot)
    out[0].sum().backward()
    assert linear.weight.grad.abs().max() > 0


def test_vmap_over_more_than_tangents_is_refused():
    """Over what a function holds, over an input, or over the parameters of a module."""
    linear, x, dots, weights = nn.Linear(3, 3), torch.randn(3, 3), torch.randn(T, 3, 3), torch.randn(T, 3, 3)
    dual = jvpgraph.transform(linear, backend="eager")

    def holds(dot: Tensor) -> Tensor:
        return jvpgraph.jvp(lambda x: x * dot, (x,), (dot,), backend="eager")[1]

    def given(dot: Tensor) -> Tensor:
        return dual(dot, tangents={"input": dot})[1]

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear

        def forward(self, dot: Tensor) -> Tensor:
            return dual(x, tangents={"input": dot})[1]

    def parameters(weight: Tensor, dot: Tensor) -> Tensor:
        return torch.func.functional_call(Around(), {"inner.weight": weight}, (dot,))

    for call, inputs in ((holds, (dots,)), (given, (dots,)), (parameters, (weights, dots))):
        with pytest.raises(ValueError, match=r"inside torch\.func's vmap: nest them the other way round"):
            torch.func.vmap(call)(*inputs)


def test_what_does_not_fit_is_refused():
    x, dots = torch.randn(2, 3), torch.randn(T, 2, 3)
    with pytest.raises(ValueError, match=r"first dim of 4, the number of tangents, not \(3, 2, 3\)"):
        jvpgraph.jvp(torch.sin, (x,), (dots,), tangents_batched=4)
    with pytest.raises(ValueError, match=r"tangents of '0' have shape \(3,\), the input has \(2, 3\)"):
        jvpgraph.jvp(torch.sin, (x,), (dots[0],), tangents_batched=True)
    with pytest.raises(ValueError, match=r"as many tangents as the others, .*'0': 3, '1': 2"):
        jvpgraph.jvp(torch.add, (x, x), (dots, dots[:2]), tangents_batched=True)
    with pytest.raises(ValueError, match="tangents_batched=True needs one graph"):
        jvpgraph.jvp(torch.sin, (x,), (dots,), tangents_batched=True, backend="op_by_op")
    with pytest.raises(ValueError, match="cannot be combined with tangents_batched=2"):
        jvpgraph.transform(LINEAR, regions="auto", tangents_batched=2)
    with pytest.raises(ValueError, match="how many tangents"):
        jvpgraph.transform(LINEAR, tangents_batched=-1)
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="attention_jvps needs tangents, and as many of each"):
        OPS.attention_jvps(q, q, q, torch.randn(2, *q.shape), torch.randn(3, *q.shape), None)


def test_what_branches_on_data_says_that_it_must_not():
    def fn(x: Tensor) -> Tensor:
        return x.sin() if x.sum() > 0 else x.cos()

    with pytest.raises(jvpgraph.CaptureError, match="With tangents_batched=3 everything has to be one graph"):
        jvpgraph.jvp(fn, (torch.ones(2),), (torch.ones(T, 2),), tangents_batched=T)
