"""Modules that stand for packages that do not install without a GPU, under their names in sys.modules.

Written from the documented signatures. Their functions are opaque to Dynamo as the real ones are: behind custom ops, in
functions that it may not trace, in autograd.Functions around what it cannot see.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.foreign import fake_flash_attn, fake_flash_attn_3
from tests.foreign.plain import band, blocks, neighbourhoods, plain

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


def opaque():
    """What Dynamo traces is ours."""
    if torch.compiler.is_compiling():
        raise AssertionError(OPAQUE)


@torch.compiler.disable
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert not return_lse
    q, k, v = (x.transpose(1, 2) if tensor_layout == "HND" else x for x in (q, k, v))
    seen = band(q.shape[1], k.shape[1], right=0, from_the_end=False) if is_causal else None
    o = plain(q, k, v, seen, scale=sm_scale)
    return (o.transpose(1, 2) if tensor_layout == "HND" else o).contiguous()


@torch.compiler.disable
def sageattn_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=False, sm_scale=None, smooth_k=True
):
    raise AssertionError(OPAQUE)


@torch.compiler.disable
def sageattn_qk_int8_pv_fp16_triton(
    q,
    k,
    v,
    tensor_layout="HND",
    quantization_backend="triton",
    is_causal=False,
    attn_mask=None,
    sm_scale=None,
    smooth_k=True,
    return_lse=False,
    **kwargs,
):
    raise AssertionError(OPAQUE)


@torch.compiler.disable
def sageattn_qk_int8_pv_fp16_cuda(
    q,
    k,
    v,
    tensor_layout="HND",
    is_causal=False,
    qk_quant_gran="per_thread",
    sm_scale=None,
    pv_accum_dtype="fp32",
    smooth_k=True,
    smooth_v=False,
    return_lse=False,
    **kwargs,
):
    raise AssertionError(OPAQUE)


@torch.compiler.disable
def sageattn_qk_int8_pv_fp8_cuda(
    q,
    k,
    v,
    tensor_layout="HND",
    is_causal=False,
    qk_quant_gran="per_thread",
    sm_scale=None,
    pv_accum_dtype="fp32+fp16",
    smooth_k=True,
    smooth_v=False,
    return_lse=False,
    **kwargs,
):
    raise AssertionError(OPAQUE)


@torch.compiler.disable
def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q,
    k,
    v,
    tensor_layout="HND",
    is_causal=False,
    qk_quant_gran="per_thread",
    sm_scale=None,
    pv_accum_dtype="fp32+fp32",
    smooth_k=True,
    return_lse=False,
    **kwargs,
):
    raise AssertionError(OPAQUE)


def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
    raise AssertionError(OPAQUE)


def neighborhood_attention_generic(
    query,
    key,
    value,
    kernel_size,
    stride=1,
    dilation=1,
    is_causal=False,
    scale=None,
    additional_keys=None,
    additional_values=None,
    attention_kwargs=None,
    backend=None,
    q_tile_shape=None,
    kv_tile_shape=None,
    backward_q_tile_shape=None,
    backward_kv_tile_shape=None,
    backward_kv_splits=None,
    backward_use_pt_reduction=False,
    run_persistent_kernel=True,
    kernel_schedule=None,
    torch_compile=False,
    return_lse=False,
):
    opaque()
    assert additional_keys is None
    assert not return_lse
    seen = neighbourhoods(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    return plain(*(x.flatten(1, -3) for x in (query, key, value)), seen, scale=scale).reshape(query.shape).contiguous()


def of_dims(name):
    """na1d, na2d and na3d have the same arguments as the function for any of them."""

    @functools.wraps(neighborhood_attention_generic)
    def call(*args, **kwargs):
        return neighborhood_attention_generic(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call


na1d, na2d, na3d = map(of_dims, ("na1d", "na2d", "na3d"))


def attention(
    query,
    key,
    value,
    is_causal=False,
    scale=None,
    seqlens_Q=None,
    seqlens_KV=None,
    cumulative_seqlen_Q=None,
    cumulative_seqlen_KV=None,
    max_seqlen_Q=None,
    max_seqlen_KV=None,
    backend=None,
    q_tile_size=None,
    kv_tile_size=None,
    backward_q_tile_size=None,
    backward_kv_tile_size=None,
    backward_kv_splits=None,
    backward_use_pt_reduction=False,
    run_persistent_kernel=True,
    kernel_schedule=None,
    torch_compile=False,
    return_lse=False,
):
    raise AssertionError(OPAQUE)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    opaque()
    seen = None
    if attn_bias is not None:
        of_q, of_k = (x.seqstart.diff().tolist() for x in (attn_bias.q_seqinfo, attn_bias.k_seqinfo))
        assert type(attn_bias) is BlockDiagonalMask
        seen = blocks(of_q, of_k)
    return plain(query, key, value, seen, scale=scale).contiguous()


@dataclass
class _SeqLenInfo:
    seqstart: torch.Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list

    @classmethod
    def of(cls, lengths):
        ends = [0]
        for n in lengths:
            ends.append(ends[-1] + n)
        return cls(torch.tensor(ends, dtype=torch.int32), max(lengths), min(lengths), ends)


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


def function_of(name, signature):
    """An opaque autograd.Function whose apply takes the arguments of a signature."""

    def forward(*_):
        raise AssertionError(OPAQUE)

    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[context, *signature.parameters.values()])
    return type(name, (torch.autograd.Function,), {"forward": staticmethod(forward)})


def without(signature, name):
    return signature.replace(parameters=[p for p in signature.parameters.values() if p.name != name])


def older(theirs, returned):
    """A function of flash_attn 3, or a Function, before the argument that asks for the logsumexp: it comes always."""
    if inspect.isclass(theirs):
        signature = without(inspect.signature(theirs.forward), returned)
        return function_of(theirs.__name__, without(signature, "ctx"))

    def call(*_, **__):
        raise AssertionError(OPAQUE)

    call.__signature__ = without(inspect.signature(theirs), returned)
    call.__name__ = call.__qualname__ = theirs.__name__
    return call


def computing(theirs, compute):
    """A function of this name and signature that is opaque to Dynamo, and otherwise differentiable in any mode."""
    signature = inspect.signature(theirs)

    def call(*args, **kwargs):
        opaque()
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        return compute(**given.arguments)

    call.__signature__ = signature
    call.__name__ = call.__qualname__ = theirs.__name__
    return call


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, causal=False, window_size=(-1, -1), **_):
    seen = blocks(
        cu_seqlens_q.diff().tolist(),
        cu_seqlens_k.diff().tolist(),
        lambda n, m: band(n, m, window_size[0], 0 if causal else window_size[1]),
    )
    return plain(q[None], k[None], v[None], seen, scale=softmax_scale)[0].contiguous()


def varlen_of_qkv(qkv, cu_seqlens, **options):
    return varlen(*qkv.unbind(1), cu_seqlens, cu_seqlens, **options)


def dense(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), **_):
    seen = band(q.shape[1], k.shape[1], window_size[0], 0 if causal else window_size[1])
    return plain(q, k, v, seen, scale=softmax_scale).contiguous()


def install_computing_flash_attn(patch: pytest.MonkeyPatch) -> None:
    """As others run it: functions without Functions and ops, whose value and derivatives are those of plain math."""
    compute = {
        "flash_attn_func": dense,
        "flash_attn_varlen_func": varlen,
        "flash_attn_varlen_qkvpacked_func": varlen_of_qkv,
    }
    functions = {name: computing(getattr(fake_flash_attn, name), how) for name, how in compute.items()}
    put_in_both(patch, "flash_attn", "flash_attn_interface", functions)


def install_computing_flash_attn_3(patch: pytest.MonkeyPatch) -> None:
    """In the version that returns the logsumexp always; here it is nothing, which nobody looks at."""
    compute = {"flash_attn_func": dense, "flash_attn_varlen_func": varlen}
    put(
        patch,
        "flash_attn_interface",
        **{
            name: computing(
                older(getattr(fake_flash_attn_3, name), "return_attn_probs"),
                lambda how=how, **given: (how(**given), None),
            )
            for name, how in compute.items()
        },
    )


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


SAGE = {name: x for name, x in list(globals().items()) if name.startswith("sageattn") and name != "sageattn3_blackwell"}
NATTEN = {"attention": attention, "neighborhood_attention_generic": neighborhood_attention_generic}
NATTEN |= {"na1d": na1d, "na2d": na2d, "na3d": na3d}


def install_sage(patch: pytest.MonkeyPatch) -> None:
    if not real("sageattention"):
        put_in_both(patch, "sageattention", "core", SAGE)
    if not real("sageattn3"):
        put_in_both(patch, "sageattn3", "api", {"sageattn3_blackwell": sageattn3_blackwell})


def install_natten(patch: pytest.MonkeyPatch) -> None:
    if not real("natten"):
        put_in_both(patch, "natten", "functional", NATTEN)


def put_in_both(patch: pytest.MonkeyPatch, package: str, module: str, members: dict[str, Any]) -> None:
    """In a module of a package, and in the package itself."""
    put(patch, f"{package}.{module}", **members)
    for name, member in members.items():
        patch.setattr(sys.modules[package], name, member, raising=False)


MASKS = {name: x for name, x in list(globals().items()) if name.endswith("Mask") or "TriangularMask" in name}


def install_xformers(patch: pytest.MonkeyPatch) -> None:
    if not real("xformers"):
        ops = put(patch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)
        put(patch, "xformers.ops.fmha.attn_bias", _AddDenseBias=_AddDenseBias, **MASKS)
        patch.setattr(ops, "LowerTriangularMask", LowerTriangularMask, raising=False)
        patch.setattr(ops.fmha, "memory_efficient_attention", memory_efficient_attention, raising=False)
        patch.setattr(ops.fmha, "BlockDiagonalMask", BlockDiagonalMask, raising=False)


# For networks that run as they are, too.
COMPUTING = {
    "flash_attn": install_computing_flash_attn,
    "flash_attn_interface": install_computing_flash_attn_3,
    "sageattention": install_sage,
    "natten": install_natten,
    "xformers": install_xformers,
}
INSTALL = {
    "flash_attn": install_flash_attn,
    "flash_attn_interface": install_flash_attn_3,
    "sageattention": install_sage,
    "natten": install_natten,
    "xformers": install_xformers,
}
