"""A call of attention as implementations get it: checked once, of rank 4, with all that a choice depends on."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from jvpgraph.kernels.block_mask import BlockMask, summary_of
from jvpgraph.kernels.checks import check_how, check_operands, check_tangents
from jvpgraph.kernels.layout import bias_to_rank4, to_rank4
from jvpgraph.kernels.window import EVERYTHING, Window, hide_more, packed_mask

__all__ = [
    "Call",
    "Cotangents",
    "Dots",
    "Gradients",
    "How",
    "Outputs",
    "Packing",
    "Place",
    "Wanted",
    "check_call",
    "is_capturing",
    "pretended_gpu",
]

Dots = tuple[Tensor | None, Tensor | None, Tensor | None]  # tangents of q, k, v
Packing = tuple[Tensor, Tensor]  # cu_seqlens of queries and of keys


class Place(NamedTuple):
    """Where a call is computed."""

    kind: str  # as of a torch.device, but "hip" for AMD's GPUs
    arch: int = 0  # compute capability, 80 for 8.0; 0 where there is none, as in Triton's interpreter

    @staticmethod
    def of(device: torch.device) -> Place:
        """That of a device; of meta tensors, the one that pretended_gpu says."""
        if device.type == "meta":
            return _pretended
        if device.type != "cuda":
            return Place(device.type)
        if torch.version.hip is not None:
            return Place("hip")
        major, minor = torch.cuda.get_device_capability(device)
        return Place("cuda", 10 * major + minor)


NOWHERE = Place("")
_pretended = Place("meta")


@contextlib.contextmanager
def pretended_gpu(arch: int) -> Iterator[None]:
    """Inside, meta tensors are on an NVIDIA GPU of this compute capability: what is planned and launched is what would
    be there."""
    global _pretended
    before, _pretended = _pretended, Place("cuda", arch)
    try:
        yield
    finally:
        _pretended = before


class How(NamedTuple):
    """What all ops share after their tensors, in the order of the schemas."""

    is_causal: bool = False
    scale: float | None = None
    window: Sequence[int] | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None
    block_map: Tensor | None = None
    partial_blocks: Tensor | None = None

    def as_window(self) -> Window:
        left, right = self.window or (-1, -1)
        return Window.of(left, 0 if self.is_causal else right)

    def as_scale(self, q: Tensor) -> float:
        if self.scale is not None:
            return self.scale
        return 1 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0

    def as_packing(self) -> Packing | None:
        if self.cu_seqlens_q is None or self.cu_seqlens_kv is None:
            return None
        return self.cu_seqlens_q, self.cu_seqlens_kv

    def as_block_mask(self) -> BlockMask | None:
        if self.block_map is None or self.partial_blocks is None:
            return None
        return BlockMask(self.block_map, self.partial_blocks)


class Wanted(NamedTuple):
    """What a backward is asked for, beside the gradients of q, k and v from one of o."""

    from_lse: bool = False  # there is a gradient of lse
    from_tangent: bool = False  # there is one of o_dot or lse_dot
    bias: bool = False
    bias_dot: bool = False


PLAIN, NOTHING = How(), Wanted()


class Outputs(NamedTuple):
    """What a forward gives: o and o_dot [B, H, Lq, Dv] in memory as B, L, H, D, lse and lse_dot [B, H, Lq]. A tangent
    that is None is zero."""

    o: Tensor
    lse: Tensor
    o_dot: Tensor | None = None
    lse_dot: Tensor | None = None


class Cotangents(NamedTuple):
    """The gradients of Outputs; one that is None is zero."""

    o: Tensor | None = None
    lse: Tensor | None = None
    o_dot: Tensor | None = None
    lse_dot: Tensor | None = None


class Gradients(NamedTuple):
    """What a backward gives; None where the input is not there, is not asked for, or has a gradient of zero. Those of
    the biases are in the dtype inside."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_dot: Tensor | None = None
    k_dot: Tensor | None = None
    v_dot: Tensor | None = None
    bias: Tensor | None = None
    bias_dot: Tensor | None = None


def check_call(
    q: Tensor, k: Tensor, v: Tensor, dots: Dots, bias: Tensor | None, bias_dot: Tensor | None, how: How
) -> None:
    """Raise ValueError for what does not fit together, in the shapes of the caller. Symbolic sizes get no guard."""
    check_operands(q, k, v, bias)
    check_tangents(q=(q, dots[0]), k=(k, dots[1]), v=(v, dots[2]), bias=(bias, bias_dot))
    check_how(q, k, bias, *how[2:])


@dataclass(frozen=True, eq=False)
class Call:
    """The tensors of a call and what is asked of it.

    q [B, H, Lq, Dqk], k [B, Hkv, Lkv, Dqk], v [B, Hkv, Lkv, Dv], tangents like them, bias and bias_dot
    [B | 1, H | 1, Lq | 1, Lkv | 1]; any strides. A tangent that is None is zero.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_dot: Tensor | None = None
    k_dot: Tensor | None = None
    v_dot: Tensor | None = None
    bias: Tensor | None = None
    bias_dot: Tensor | None = None
    window: Window = EVERYTHING
    scale: float = 1.0
    packing: Packing | None = None
    block_mask: BlockMask | None = None
    wanted: Wanted = NOTHING
    place: Place = NOWHERE  # unless said, that of q

    def __post_init__(self) -> None:
        if not self.place.kind:
            object.__setattr__(self, "place", Place.of(self.q.device))

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dots: Dots = (None, None, None),
        bias: Tensor | None = None,
        bias_dot: Tensor | None = None,
        how: How = PLAIN,
        wanted: Wanted = NOTHING,
    ) -> Call:
        """A call in the shapes that callers have. Raises ValueError for what does not fit together."""
        check_call(q, k, v, dots, bias, bias_dot, how)
        q_dot, k_dot, v_dot = (None if x is None else to_rank4(x) for x in dots)
        return cls(
            to_rank4(q),
            to_rank4(k),
            to_rank4(v),
            q_dot,
            k_dot,
            v_dot,
            bias_to_rank4(q, bias),
            bias_to_rank4(q, bias_dot),
            how.as_window(),
            how.as_scale(q),
            how.as_packing(),
            how.as_block_mask(),
            wanted,
        )

    @property
    def dots(self) -> Dots:
        return self.q_dot, self.k_dot, self.v_dot

    @property
    def s_active(self) -> bool:
        """Whether the scores have a tangent."""
        return self.q_dot is not None or self.k_dot is not None or self.bias_dot is not None

    @property
    def is_active(self) -> bool:
        """Whether anything has a tangent."""
        return self.s_active or self.v_dot is not None

    @property
    def through_tangent(self) -> bool:
        """Whether a backward has to go through the tangent."""
        return self.wanted.from_tangent and self.is_active

    @property
    def has_additive_bias(self) -> bool:
        return self.bias is not None and self.bias.dtype != torch.bool

    @property
    def is_empty(self) -> bool:
        return 0 in (self.q.numel(), self.k.numel(), self.v.numel())

    @functools.cached_property
    def summary(self) -> BlockMask | None:
        """The tiles of a dense boolean mask, where it is worth it to visit some of them only: see summary_of."""
        return summary_of(self.bias)

    def sequences(self) -> Iterator[tuple[slice, slice, Call]]:
        """The queries, the keys and the call of each packed sequence. Waits for the device."""
        assert self.packing is not None
        for at in zip(*(itertools.pairwise(cu.tolist()) for cu in self.packing)):
            at_q, at_kv = (slice(*ends) for ends in at)
            q, q_dot = (None if x is None else x[:, :, at_q] for x in (self.q, self.q_dot))
            k, v, k_dot, v_dot = (None if x is None else x[:, :, at_kv] for x in (self.k, self.v, *self.dots[1:]))
            assert q is not None
            assert k is not None
            assert v is not None
            yield at_q, at_kv, replace(self, q=q, k=k, v=v, q_dot=q_dot, k_dot=k_dot, v_dot=v_dot, packing=None)

    def with_dense_mask(self) -> Call:
        """This, but with a block mask as a dense one: a byte for each pair of a query and a key."""
        if self.block_mask is None:
            return self
        mask = self.block_mask.dense(self.q.shape[2], self.k.shape[2])
        return replace(self, bias=hide_more(mask, self.bias), block_mask=None)

    def without_waiting(self) -> Call:
        """This, but packed sequences as a dense mask while a CUDA graph is captured, which must not wait for their
        lengths: a byte for each pair of a query and a key."""
        if self.packing is None or not is_capturing(self.q):
            return self
        mask = packed_mask(*self.packing, self.q.shape[2], self.k.shape[2], self.window)
        return replace(self, bias=mask, window=EVERYTHING, packing=None)


def is_capturing(q: Tensor) -> bool:
    return q.is_cuda and torch.cuda.is_current_stream_capturing()
