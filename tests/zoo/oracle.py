"""What a model's tangent and parameter gradients should be, by means that share nothing with jvpgraph."""

import itertools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_mask
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Inputs = dict[str, Any]


def leaf(inputs: Any, path: str) -> Any:
    """The item of nested dicts, lists and tuples at a dotted path such as "x.0"."""
    for key in path.split("."):
        inputs = inputs[key if isinstance(inputs, Mapping) else int(key)]
    return inputs


def with_leaves(inputs: Inputs, leaves: Mapping[str, Any]) -> Inputs:
    """A copy of inputs with the items at the given paths replaced; what is not on a path is shared."""
    for path, value in leaves.items():
        inputs = _replace(inputs, path.split("."), value)
    return inputs


def _replace(tree: Any, keys: list[str], value: Any) -> Any:
    if not keys:
        return value
    if isinstance(tree, Mapping):
        return {**tree, keys[0]: _replace(tree[keys[0]], keys[1:], value)}
    i = int(keys[0])
    return type(tree)([*tree[:i], _replace(tree[i], keys[1:], value), *tree[i + 1 :]])


def random_tangents(inputs: Inputs, paths: tuple[str, ...], seed: int = 0) -> dict[str, Tensor]:
    """A standard normal tangent for each path."""
    generator = torch.Generator().manual_seed(seed + 77)
    return {p: torch.randn(leaf(inputs, p).shape, generator=generator, dtype=torch.float64) for p in paths}


def float_leaves(output: Any) -> list[Tensor]:
    """The floating tensors of a model's output, in pytree order."""
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


NARROW = {torch.float32, torch.bfloat16, torch.float16}
NARROWING = {Tensor.float, Tensor.bfloat16, Tensor.half}


class AllDouble(TorchFunctionMode):
    """Turns a model's own casts to narrower types into float64: nothing is rounded away."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        widen = lambda x: torch.float64 if isinstance(x, torch.dtype) and x in NARROW else x  # noqa: E731
        func = Tensor.double if func in NARROWING else func
        return func(*map(widen, args), **{k: widen(v) for k, v in (kwargs or {}).items()})


def dense_flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: Any = None,
    **_: Any,
) -> Tensor:
    """flex_attention as it is when compiled, which looks at the lists of blocks; in eager mode it looks at mask_mod
    alone, and has no derivatives on a CPU, where flex_attention refuses tensors that require gradients."""
    assert score_mod is None
    mask = None
    if block_mask is not None:
        B, H, n_q, n_k = *block_mask.kv_indices.shape[:2], query.shape[2], key.shape[2]
        partial, full = (torch.zeros(B, H, *_grid(block_mask, n_q, n_k), dtype=torch.bool) for _ in range(2))
        for blocks, count, index in (
            (partial, block_mask.kv_num_blocks, block_mask.kv_indices),
            (full, block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
        ):
            for at in itertools.product(*map(range, count.shape)) if count is not None else ():
                blocks[(*at, index[at][: count[at]].long())] = True
        partial, full = (_expanded(x, block_mask.BLOCK_SIZE)[..., :n_q, :n_k] for x in (partial, full))
        mask = (partial & create_mask(block_mask.mask_mod, B, H, n_q, n_k, device="cpu")) | full
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)
    return out if mask is None else torch.where(mask.any(-1, keepdim=True), out, 0)


def _grid(block_mask: Any, n_q: int, n_k: int) -> tuple[int, int]:
    return -(-n_q // block_mask.BLOCK_SIZE[0]), -(-n_k // block_mask.BLOCK_SIZE[1])


def _expanded(blocks: Tensor, size: tuple[int, int]) -> Tensor:
    return blocks.repeat_interleave(size[0], -2).repeat_interleave(size[1], -1)


@contextmanager
def differentiable() -> Iterator[None]:
    """Attention in forms that PyTorch differentiates, in float64 throughout."""
    with sdpa_kernel(SDPBackend.MATH), patch.object(flex, "flex_attention", dense_flex_attention):
        yield


def oracle(model: nn.Module, inputs: Inputs, tangents: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor], str]:
    """Outputs, their tangents, and their source: "forward AD" or, where that raises, "differences".

    Both run in float64 with the math attention. Forward AD does the model's own arithmetic: where the model
    casts to narrower types it rounds as they do, see Case.tolerance. Differences run without those casts and
    are good to about 1e-7.
    """
    try:
        return *forward_ad(model, inputs, tangents), "forward AD"
    except (RuntimeError, NotImplementedError):
        return *differences(model, inputs, tangents), "differences"


def forward_ad(model: nn.Module, inputs: Inputs, tangents: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    paths = list(tangents)

    def f(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(float_leaves(model(**with_leaves(inputs, dict(zip(paths, leaves))))))

    primals = tuple(leaf(inputs, p) for p in paths)
    with differentiable(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch scripts its own rules on first use
        y, y_dot = torch.func.jvp(f, primals, tuple(tangents.values()))
    return list(y), list(y_dot)


def differences(
    model: nn.Module, inputs: Inputs, tangents: dict[str, Tensor], step: float = 1e-6
) -> tuple[list[Tensor], list[Tensor]]:
    """Central differences at step, step/2 and step/4, extrapolated to an error of order step**6."""

    def f(h: float) -> list[Tensor]:
        moved = {p: leaf(inputs, p) + h * x_dot for p, x_dot in tangents.items()}
        return float_leaves(model(**with_leaves(inputs, moved)))

    with differentiable(), torch.no_grad():
        y = float_leaves(model(**inputs))
        with AllDouble():
            slopes = [
                [(a.double() - b.double()) / (2 * h) for a, b in zip(f(h), f(-h))] for h in (step, step / 2, step / 4)
            ]
    d0, d1, d2 = ([torch.as_tensor(d) for d in row] for row in slopes)
    r0 = [(4 * b - a) / 3 for a, b in zip(d0, d1)]
    r1 = [(4 * b - a) / 3 for a, b in zip(d1, d2)]
    return y, [(16 * b - a) / 15 for a, b in zip(r0, r1)]


def projected(outputs: list[Tensor], seed: int = 0) -> Tensor:
    """sum(y * w) over the outputs, w standard normal: a scalar that every entry of y takes part in."""
    generator = torch.Generator().manual_seed(seed)
    weighted = (y * torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs)
    return torch.stack([w.sum() for w in weighted]).sum()


def oracle_grads(model: nn.Module, inputs: Inputs, seed: int = 0) -> dict[str, Tensor]:
    """Gradients of sum(y * w), w standard normal, for every parameter that the eager model reaches."""
    with differentiable():  # the fused CPU kernel keeps its log-sum-exp in float32
        loss = projected(float_leaves(model(**inputs)), seed)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, grads) if g is not None}
