"""Modules that stand for packages that do not install without a GPU, under their names in sys.modules.

Written from the documented signatures. Their functions are opaque to Dynamo as the real ones are: behind custom ops, in
functions that it may not trace, in autograd.Functions around what it cannot see.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.foreign import fake_flash_attn, fake_flash_attn_3

OPAQUE = "a stand-in's kernel, which nothing may trace"


def real(package: str) -> bool:
    """Whether the package itself is to be used."""
    return torch.cuda.is_available() and importlib.util.find_spec(package) is not None


def put(patch: pytest.MonkeyPatch, name: str, **members: Any) -> types.ModuleType:
    """A module of this name, with the packages around it; functions and classes say that they are from there."""
    module = types.ModuleType(name)
    for key, value in members.items():
        if getattr(value, "__module__", "").startswith("tests."):
            value.__module__ = name
        setattr(module, key, value)
    patch.setitem(sys.modules, name, module)
    parent, _, last = name.rpartition(".")
    if parent and parent not in sys.modules:
        put(patch, parent)
    if parent:
        patch.setattr(sys.modules[parent], last, module, raising=False)
    return module


@torch.compiler.disable
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    raise AssertionError(OPAQUE)


@torch.compiler.disable
def sageattn_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=False, sm_scale=None, smooth_k=True
):
    raise AssertionError(OPAQUE)


def na1d(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, return_lse=False):
    raise AssertionError(OPAQUE)


def na2d(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, return_lse=False):
    raise AssertionError(OPAQUE)


def na3d(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, return_lse=False):
    raise AssertionError(OPAQUE)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    raise AssertionError(OPAQUE)


@dataclass
class _SeqLenInfo:
    seqstart: torch.Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list

    @classmethod
    def of(cls, lengths):
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        return cls(ends, max(lengths), min(lengths), ends.tolist())


@dataclass
class _PaddedSeqLenInfo(_SeqLenInfo):
    seqlen: torch.Tensor
    seqlen_py: list
    padding: int

    @classmethod
    def of(cls, lengths, padding):
        starts = list(range(0, len(lengths) * padding + 1, padding))
        return cls(*_starts_and_most(starts, lengths), torch.tensor(lengths).int(), lengths, padding)


@dataclass
class _GappySeqInfo(_SeqLenInfo):
    seqlen: torch.Tensor
    seqlen_py: list

    @classmethod
    def of(cls, starts, lengths):
        return cls(*_starts_and_most(starts, lengths), torch.tensor(lengths).int(), lengths)


def _starts_and_most(starts, lengths):
    return torch.tensor(starts).int(), max(lengths), min(lengths), starts


class _Wrapper(torch.Tensor):
    """The masks without a window are wrappers of a tensor, in newer versions."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.detach, torch.ops.aten._to_copy):
            return cls._around(func(args[0]._subtensor, *args[1:], **(kwargs or {})))
        return NotImplemented

    def __tensor_flatten__(self):
        return ["_subtensor"], None

    @classmethod
    def __tensor_unflatten__(cls, inner_tensors, meta, outer_size, outer_stride):
        return cls._around(inner_tensors["_subtensor"])


class LowerTriangularMask(_Wrapper):
    @staticmethod
    def __new__(cls, *, _subtensor=None, device="cpu", **kwargs):
        inner = torch.empty(0, device=device) if _subtensor is None else _subtensor
        tensor = torch.Tensor._make_wrapper_subclass(cls, [], device=inner.device, dtype=inner.dtype)
        tensor._subtensor = inner
        return tensor

    def __init__(self, *args, **kwargs):
        super().__init__()

    @classmethod
    def _around(cls, inner):
        return cls(_subtensor=inner)

    def add_bias(self, bias):
        return _AddDenseBias.apply(self, bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    @staticmethod
    def __new__(cls, bias):
        how = {"device": bias.device, "dtype": bias.dtype, "requires_grad": bias.requires_grad}
        tensor = torch.Tensor._make_wrapper_subclass(cls, bias.shape, **how)
        tensor._subtensor = bias
        return tensor

    @classmethod
    def _around(cls, inner):
        return cls(inner)


torch._dynamo.allow_in_graph(LowerTriangularMask)
torch._dynamo.allow_in_graph(LowerTriangularMaskWithTensorBias)


class _AddDenseBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, causal_bias, tensor):
        return LowerTriangularMaskWithTensorBias(tensor)

    @staticmethod
    def backward(ctx, grad_out):
        return None, grad_out


class OlderLowerTriangularMask:
    """As in older versions."""

    def add_bias(self, bias):
        return OlderLowerTriangularMaskWithTensorBias(bias)


class OlderLowerTriangularMaskWithTensorBias(OlderLowerTriangularMask):
    def __init__(self, bias):
        self._bias = bias


OlderLowerTriangularMask.__name__ = "LowerTriangularMask"
OlderLowerTriangularMaskWithTensorBias.__name__ = "LowerTriangularMaskWithTensorBias"


class LowerTriangularFromBottomRightMask:
    def make_local_attention(self, window_size):
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    _window_size: int


@dataclass
class LocalAttentionFromBottomRightMask:
    window_left: int
    window_right: int


@dataclass
class BlockDiagonalMask:
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: Any = None

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None):
        of_q = _SeqLenInfo.of(q_seqlen)
        return cls(of_q, of_q if kv_seqlen is None else _SeqLenInfo.of(kv_seqlen))

    def make_local_attention(self, window_size):
        return BlockDiagonalCausalLocalAttentionMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size)

    def make_local_attention_from_bottomright(self, window_size):
        kind = BlockDiagonalCausalLocalAttentionFromBottomRightMask
        return kind(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    pass


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    pass


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    _window_size: int = 0


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    _window_size: int = 0


@dataclass
class BlockDiagonalPaddedKeysMask:
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_padding, kv_seqlen, causal_diagonal=None):
        return cls(_SeqLenInfo.of(q_seqlen), _PaddedSeqLenInfo.of(kv_seqlen, kv_padding))

    @classmethod
    def from_seqlens_local(cls, q_seqlen, kv_padding, kv_seqlen, *window):
        return cls(_SeqLenInfo.of(q_seqlen), _PaddedSeqLenInfo.of(kv_seqlen, kv_padding), *window)


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    causal_diagonal: Any = None


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    window_left: int
    window_right: int


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    _window_size: int


@dataclass
class PagedBlockDiagonalPaddedKeysMask:
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo
    block_tables: torch.Tensor
    page_size: int


@dataclass
class BlockDiagonalGappyKeysMask:
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _GappySeqInfo

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqstarts, kv_seqlen):
        return cls(_SeqLenInfo.of(q_seqlen), _GappySeqInfo.of(kv_seqstarts, kv_seqlen))


class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    pass


@dataclass
class BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask(BlockDiagonalGappyKeysMask):
    window_left: int
    window_right: int

    @classmethod
    def from_seqlens_local(cls, q_seqlen, kv_seqstarts, kv_seqlen, window_left, window_right):
        keys = _GappySeqInfo.of(kv_seqstarts, kv_seqlen)
        return cls(_SeqLenInfo.of(q_seqlen), keys, window_left, window_right)


def install_flash_attn(patch: pytest.MonkeyPatch) -> None:
    if real("flash_attn"):
        return
    put(patch, "flash_attn")
    patch.setitem(sys.modules, "flash_attn.flash_attn_interface", fake_flash_attn)
    for name in dir(fake_flash_attn):
        if name.startswith("flash_attn_"):
            patch.setattr(sys.modules["flash_attn"], name, getattr(fake_flash_attn, name), raising=False)


def install_flash_attn_3(patch: pytest.MonkeyPatch) -> None:
    if not real("flash_attn_interface"):
        patch.setitem(sys.modules, "flash_attn_interface", fake_flash_attn_3)


def install_sage(patch: pytest.MonkeyPatch) -> None:
    if not real("sageattention"):
        core = put(patch, "sageattention.core", sageattn=sageattn, sageattn_varlen=sageattn_varlen)
        for name in ("sageattn", "sageattn_varlen"):
            patch.setattr(sys.modules["sageattention"], name, getattr(core, name), raising=False)


def install_natten(patch: pytest.MonkeyPatch) -> None:
    if not real("natten"):
        put(patch, "natten.functional", na1d=na1d, na2d=na2d, na3d=na3d)
        for name in ("na1d", "na2d", "na3d"):
            patch.setattr(sys.modules["natten"], name, globals()[name], raising=False)


MASKS = {name: x for name, x in list(globals().items()) if name.endswith("Mask") or "TriangularMask" in name}


def install_xformers(patch: pytest.MonkeyPatch) -> None:
    if not real("xformers"):
        put(patch, "xformers.ops.fmha.attn_bias", _AddDenseBias=_AddDenseBias, **MASKS)
        put(patch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)
        patch.setattr(sys.modules["xformers.ops"], "LowerTriangularMask", LowerTriangularMask, raising=False)


INSTALL = {
    "flash_attn": install_flash_attn,
    "flash_attn_interface": install_flash_attn_3,
    "sageattention": install_sage,
    "natten": install_natten,
    "xformers": install_xformers,
}
