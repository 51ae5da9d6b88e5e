"""Views, indexing, joining, padding, resampling: the op on the tangent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from jvpgraph.rules.reduce import in_float32
from jvpgraph.rules.registry import jvp, linear

aten = torch.ops.aten

# Views. A tangent has the shape of its primal but not always its strides, hence reshape where view is strict.
jvp(aten.view.default, aten._unsafe_view.default)(lambda y, x, size, *, x_dot: x_dot.reshape(size))
jvp(aten._reshape_alias.default)(lambda y, x, size, stride, *, x_dot: x_dot.reshape(size))
linear(
    *(aten.permute.default, aten.transpose.int, aten.t.default, aten.alias.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default),
    *(aten.slice.Tensor, aten.select.int, aten.diagonal.default, aten.unfold.default, aten.unbind.int),
    *(aten.split.Tensor, aten.split_with_sizes.default),
)


def stops_tangent(x: Tensor, size: Any, implicit: bool) -> bool:
    """Whether this expand is a mark of mark_stop_gradients: PyTorch itself, broadcasting, expands by something."""
    same = all(statically_known_true(s == -1) or statically_known_true(s == n) for s, n in zip(size, x.shape))
    return implicit and same and len(size) == x.dim()


@jvp(aten.expand.default)
def expand(y, x, size, implicit, *, x_dot):
    return None if stops_tangent(x, size, implicit) else x_dot.expand(size)


def dense(x: Tensor, *_: Any) -> bool:
    return x.is_contiguous() and x.storage_offset() == 0


@jvp(aten.as_strided.default, when=dense)
def as_strided(y, x, size, stride, offset, *, x_dot):
    """Strides and offset count in memory, so the tangent has to be laid out as the primal is."""
    return x_dot.clone(memory_format=torch.contiguous_format).as_strided(size, stride, offset)


def check_bits(of: torch.dtype, seen_as: torch.dtype) -> None:
    """Raise NotImplementedError where bits are seen in another dtype than the complex or real one of theirs."""
    numbers = seen_as.is_floating_point or seen_as.is_complex
    if not numbers or of.to_real() != seen_as.to_real():
        raise NotImplementedError(f"the bits of {of} numbers with a tangent are read as {seen_as}: use .to({seen_as})")


@jvp(aten.view.dtype)
def view_as(y, x, dtype, *, x_dot):
    """Complex numbers as pairs of real ones, and back."""
    check_bits(x.dtype, dtype)
    return x_dot.contiguous().view(dtype)


linear(aten.clone.default, aten._to_copy.default)
linear(torch.ops.prims.convert_element_type.default)
linear(aten.detach.default)  # PyTorch's own: a user's stops the tangent by the mark behind it, or op by op
linear(aten.lift_fresh_copy.default)


@jvp(aten.copy.default)
def copy(y, x, src, *_, x_dot=None, src_dot=None):
    """What is overwritten does not matter."""
    return None if src_dot is None else src_dot.to(y)


@jvp(aten.fill.Tensor)
def fill(y, x, value, *, x_dot=None, value_dot=None):
    return None if value_dot is None else value_dot.to(y)


# Joining and repeating
linear(aten.cat.default, aten.stack.default)
linear(aten.repeat.default, aten.roll.default, aten.flip.default)
linear(aten.tril.default, aten.triu.default, aten.diag_embed.default)

# Reading by index
linear(aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_select.default, aten.gather.default)
linear(aten.embedding.default)  # in the table; the ids never have a tangent

# Writing by index
linear(aten.select_scatter.default, aten.slice_scatter.default, aten.diagonal_scatter.default, wrt="self src")
linear(aten.scatter.src, aten.scatter_add.default, wrt="self src")
linear(aten.scatter_reduce.two, wrt="self src", when=lambda x, d, i, src, reduce, *_: reduce == "sum")
linear(aten.index_put.default, aten._unsafe_index_put.default, wrt="self values")
linear(aten.index_add.default, aten.index_copy.default, wrt="self source")
jvp(aten.scatter.value)(lambda y, x, dim, index, value, *, x_dot: x_dot.scatter(dim, index, 0))
jvp(aten.index_fill.int_Scalar)(lambda y, x, dim, index, value, *, x_dot: x_dot.index_fill(dim, index, 0))

# Padding
jvp(aten.constant_pad_nd.default)(lambda y, x, pad, value, *, x_dot: aten.constant_pad_nd(x_dot, pad, 0))
linear(aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)
linear(aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default)

# Patches and resampling
linear(aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.im2col.default, aten.col2im.default)
linear(aten.avg_pool2d.default, aten.avg_pool3d.default)
linear(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default)
linear(aten.upsample_nearest1d.default, aten.upsample_nearest2d.default, aten.upsample_nearest3d.default)
linear(aten._upsample_nearest_exact2d.default, aten._upsample_nearest_exact3d.default)
linear(aten.upsample_linear1d.default, aten.upsample_bilinear2d.default, aten.upsample_trilinear3d.default)
linear(aten.upsample_bicubic2d.default)
linear(aten._upsample_bilinear2d_aa.default, aten._upsample_bicubic2d_aa.default)


def grid_sampler(op: Any, backward: Any) -> None:
    """Linear in the images. The op's backward has the slopes by the grid, if each channel is an image of its own.

    In float32, as positions in half are off by much of a pixel.
    """
    jvp(op)(lambda y, x, grid, *how, x_dot: op(in_float32(x_dot), in_float32(grid), *how))

    @jvp(op)
    def by_the_grid(y, x, grid, mode, padding, corners, *, grid_dot):
        images = in_float32(x).flatten(0, 1).unsqueeze(1).contiguous()
        grid, grid_dot = (in_float32(g).repeat_interleave(x.shape[1], 0) for g in (grid, grid_dot))
        ones = torch.ones_like(in_float32(y)).flatten(0, 1).unsqueeze(1).contiguous()
        slope = backward(ones, images, grid, mode, padding, corners, [False, True])[1]
        return (slope * grid_dot).sum(-1).reshape(y.shape)


grid_sampler(aten.grid_sampler_2d.default, aten.grid_sampler_2d_backward)
grid_sampler(aten.grid_sampler_3d.default, aten.grid_sampler_3d_backward)

# Fourier
linear(aten._fft_r2c.default, aten._fft_c2c.default, aten._fft_c2r.default)
