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
    seqstart_py: list

    @classmethod
    def of(cls, lengths):
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        return cls(ends, max(lengths), ends.tolist())


@dataclass
class _PaddedSeqLenInfo(_SeqLenInfo):
    seqlen: torch.Tensor = None
    seqlen_py: list = None


class LowerTriangularMask(torch.Tensor):
    """A subclass of Tensor, as in some versions."""

    def __new__(cls, device=None):
        return torch.Tensor._make_subclass(cls, torch.empty(0))


@dataclass
class LowerTriangularFromBottomRightMask:
    pass


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


class BlockDiagonalCausalMask(BlockDiagonalMask):
    pass


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    pass


@dataclass
class BlockDiagonalPaddedKeysMask:
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo


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


MASKS = (
    *(LowerTriangularMask, LowerTriangularFromBottomRightMask, LocalAttentionFromBottomRightMask, BlockDiagonalMask),
    *(BlockDiagonalCausalMask, BlockDiagonalCausalFromBottomRightMask, BlockDiagonalPaddedKeysMask),
)


def install_xformers(patch: pytest.MonkeyPatch) -> None:
    if not real("xformers"):
        put(patch, "xformers.ops.fmha.attn_bias", **{mask.__name__: mask for mask in MASKS})
        put(patch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)
        patch.setattr(sys.modules["xformers.ops"], "LowerTriangularMask", LowerTriangularMask, raising=False)


INSTALL = {
    "flash_attn": install_flash_attn,
    "flash_attn_interface": install_flash_attn_3,
    "sageattention": install_sage,
    "natten": install_natten,
    "xformers": install_xformers,
}
