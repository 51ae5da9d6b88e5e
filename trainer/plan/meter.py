"""Bytes and FLOPs of ops as they run, on the meta device too, where nothing is allocated or computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from jvpgraph.passes.count import ATTENTION, attention_flops

BLOCKS = torch._C.DispatchKey.CompositeExplicitAutograd
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Meter(TorchDispatchMode):
    """Follows every op: what its results allocate, until they are freed, and what it computes.

    What a kernel allocates for itself while it runs is not seen, but for ops of jvpgraph by blocks of torch ops.

    Args:
        known: tensors whose memory counts as nothing, such as parameters.
        by_blocks: whether that is how they run: without a GPU, whose kernels need little.

    Attributes:
        now: bytes that are allocated, beyond `known`.
        timeline: `now` after each op.
        aside: bytes that are not the process's to keep any more, such as gradients that FSDP2 has reduced.
        beside: `now` without them after each op.
        flops: so far; a multiply-add counts 2, as in the reports of jvpgraph.
    """

    def __init__(self, known: Iterable[Tensor] = (), *, by_blocks: bool = False) -> None:
        super().__init__()
        self.by_blocks = by_blocks
        self.now = 0
        self.timeline: list[int] = []
        self.aside = 0
        self.beside: list[int] = []
        self.flops = 0
        self.kept = [tensor.untyped_storage() for tensor in known]
        self.live: dict[int, Any] = dict.fromkeys(storage._cdata for storage in self.kept)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled is to be compiled as ever; its ops are seen when it runs."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self.now
        out = func(*args, **kwargs)
        if self.by_blocks and func.namespace == "jvpgraph" and func.has_kernel_for_dispatch_key(BLOCKS):
            self._note(before + needed_by_blocks(func, args, kwargs))
        for tensor in leaves_of(out):
            self._add(tensor)
        self._note(self.now)
        self.flops += flops_of(func, args, kwargs, out)
        return out

    def _note(self, size: int) -> None:
        self.timeline.append(size)
        self.beside.append(size - self.aside)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            size = storage.nbytes()
            self.now += size
            self.live[key] = weakref.ref(storage, lambda _: self._drop(key, size))

    def _drop(self, key: int, size: int) -> None:
        del self.live[key]
        self.now -= size


def needed_by_blocks(func: Any, args: Any, kwargs: Any) -> int:
    """The most bytes that an op of ours has on a CPU, by whose caches it chooses its blocks; results included."""

    def there(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)

    with FakeTensorMode():
        args, kwargs = tree_map_only(Tensor, there, (args, kwargs))
        with Meter(leaves_of(args, kwargs)) as inside:
            func._op_dk(BLOCKS, *args, **kwargs)
    return max(inside.timeline, default=0)


def leaves_of(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """As `jvpgraph.passes.count` has it, for one call."""
    if func in ATTENTION:
        return int(sum(attention_flops(func, args, kwargs)))
    if func.overloadpacket in (FUSED, FUSED_BACKWARD):
        q, k, v = args[:3] if func.overloadpacket is FUSED else args[1:4]
        scores = 2 * q.shape[:-1].numel() * k.shape[-2]
        qk, pv = scores * q.shape[-1], scores * v.shape[-1]
        return qk + pv if func.overloadpacket is FUSED else 3 * qk + 2 * pv
    formula = flop_registry.get(func.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as kernels compute it, on the meta device too: PyTorch would write its matrices of scores out there.

    Not a mode: backwards, in which checkpointed blocks are computed again, are run without those.
    """
    get_torch_obj_rule_map()  # what Dynamo knows of torch it looks up once: not while that is patched
    with patch.object(functional, "scaled_dot_product_attention", fused):
        yield


@contextmanager
def numbers_on_meta() -> Iterator[None]:
    """Tensors of numbers that a forward makes on the meta device are seen by Dynamo, as those on other devices are."""
    get_torch_obj_rule_map()
    with ExitStack() as stack:
        for name in ("tensor", "as_tensor", "asarray"):
            stack.enter_context(patch.object(torch, name, moved_there(getattr(torch, name))))
        yield


def moved_there(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if getattr(device, "type", device) != "meta":
            return make(data, *args, device=device, **kwargs)
        return make(data, *args, **kwargs).to(device)

    return made


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What functional.scaled_dot_product_attention takes."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    q, k, v = (x.reshape(*[1] * (4 - x.dim()), *x.shape) for x in (query, key, value))
    out: Tensor = FUSED(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out.reshape(*query.shape[:-1], value.shape[-1])
