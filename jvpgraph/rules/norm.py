"""Normalisations, in float32 from the statistics that the primal saved, as ATen's own backward does.

PyTorch's own formulas leave the statistics without a tangent, so every operand is in the table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jvpgraph.precision import HALF
from jvpgraph.rules.reduce import in_float32
from jvpgraph.rules.registry import jvp

aten = torch.ops.aten


def weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


def statistics(x: Tensor, mean: Tensor, rstd: Tensor, dims: Any, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation as the primal saved them; anew where it rounded them to half, as on a CPU.

    They are written as the op's decomposition has them, so that a compiler finds them computed already.
    """
    if rstd.dtype not in HALF:
        return mean, rstd
    variance, mean = torch.var_mean(in_float32(x), dims, correction=0, keepdim=True)
    return mean, torch.rsqrt(variance + eps)


def standardized(x: Tensor, mean: Tensor, rstd: Tensor, dims: Any, x_dot: Tensor) -> tuple[Tensor, ...]:
    """Tangents of x_hat = (x - mean) * rstd, of mean and of rstd.

    x_hat_dot = rstd * (d - x_hat * mean(x_hat * d)), d = x_dot - mean(x_dot). mean(x_hat * x_dot) is the same number,
    but there mean(x_hat), which is rounding instead of zero, is multiplied by mean(x_dot).
    """
    x, x_dot, mean, rstd = in_float32(x), in_float32(x_dot), in_float32(mean), in_float32(rstd)
    x_hat = (x - mean) * rstd
    mean_dot = x_dot.mean(dims, keepdim=True)
    centred = x_dot - mean_dot
    slope = (x_hat * centred).mean(dims, keepdim=True)
    return rstd * (centred - x_hat * slope), mean_dot, -rstd * rstd * slope


def standard(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (in_float32(x) - in_float32(mean)) * in_float32(rstd)


@jvp(aten.native_layer_norm.default)
def layer_norm(outs, x, shape, weight, bias, eps, *, x_dot):
    dims = tuple(range(-len(shape), 0))
    mean, rstd = statistics(x, outs[1], outs[2], dims, eps)
    x_hat_dot, mean_dot, rstd_dot = standardized(x, mean, rstd, dims, x_dot)
    return weighted(x_hat_dot, weight), mean_dot, rstd_dot


@jvp(aten.native_layer_norm.default)
def layer_norm_by_weight(outs, x, shape, w, bias, eps, *, w_dot):
    mean, rstd = statistics(x, outs[1], outs[2], tuple(range(-len(shape), 0)), eps)
    return standard(x, mean, rstd) * w_dot, None, None


jvp(aten.native_layer_norm.default)(lambda o, x, n, w, b, eps, *, b_dot: (b_dot, None, None))


@jvp(aten._fused_rms_norm.default)
def rms_norm(outs, x, shape, weight, eps, *, x_dot):
    """As a layer norm whose mean is zero: r_dot = -r**2 * mean(x_hat * x_dot)."""
    rstd, x, x_dot = in_float32(outs[1]), in_float32(x), in_float32(x_dot)
    x_hat = x * rstd
    slope = (x_hat * x_dot).mean(tuple(range(-len(shape), 0)), keepdim=True)
    return weighted(rstd * (x_dot - x_hat * slope), weight), -rstd * rstd * slope


jvp(aten._fused_rms_norm.default)(lambda o, x, n, w, eps, *, w_dot: (in_float32(x) * in_float32(o[1]) * w_dot, None))


@jvp(aten.native_group_norm.default)
def group_norm(outs, x, weight, bias, N, C, HxW, group, eps, *, x_dot=None, weight_dot=None, bias_dot=None):
    def grouped(t: Tensor) -> Tensor:
        return t.unflatten(1, (group, -1)).flatten(2)  # also of no samples, of which reshape infers nothing

    def of_groups(t: Tensor) -> Tensor:
        return t.reshape(N, group, 1)

    y_dot, mean_dot, rstd_dot = None, None, None
    mean, rstd = statistics(grouped(x), of_groups(outs[1]), of_groups(outs[2]), -1, eps)
    if x_dot is not None:
        dots = standardized(grouped(x), mean, rstd, -1, grouped(x_dot))
        y_dot = weighted(dots[0].reshape(x.shape), over_channels(weight, x))
        mean_dot, rstd_dot = dots[1].squeeze(-1), dots[2].squeeze(-1)
    x_hat = standard(grouped(x), mean, rstd).reshape(x.shape)
    return affine(y_dot, x_hat, over_channels(weight_dot, x), over_channels(bias_dot, x)), mean_dot, rstd_dot


def per_channel(of_channels: Tensor, x: Tensor) -> Tensor:
    """[C] as [C, 1, ...], to go with ``x`` [N, C, ...]."""
    return of_channels.reshape(-1, *[1] * (x.dim() - 2))


def over_channels(of_channels: Tensor | None, x: Tensor) -> Tensor | None:
    return None if of_channels is None else per_channel(of_channels, x)


def affine(y_dot: Tensor | None, x_hat: Tensor, weight_dot: Tensor | None, bias_dot: Tensor | None) -> Tensor:
    """What the tangents of weight and bias add to ``y_dot``."""
    terms = [y_dot, None if weight_dot is None else x_hat * weight_dot, bias_dot]
    return sum(term for term in terms if term is not None)  # type: ignore[return-value]


def batch_norm(outs, x, weight, running_mean, running_var, training, momentum, eps, dots):
    """Tangents of y, of the batch's mean and rstd, and of the running statistics; ``dots`` in the order of arguments.

    In training a layer norm over all dims but the channel's, else affine.
    """
    x_dot, weight_dot, bias_dot, running_mean_dot, running_var_dot = dots
    weight, weight_dot, bias_dot = (over_channels(t, x) for t in (weight, weight_dot, bias_dot))
    stats_dot: list[Tensor | None] = [None] * 4
    x_hat_dot: Any = None
    if training:
        stats_dot[2] = None if running_mean_dot is None else running_mean_dot * (1 - momentum)
        stats_dot[3] = None if running_var_dot is None else running_var_dot * (1 - momentum)
        dims = [0, *range(2, x.dim())]
        mean, rstd = statistics(x, per_channel(outs[1], x), per_channel(outs[2], x), dims, eps)
        if x_dot is not None:
            x_hat_dot, mean_dot, rstd_dot = standardized(x, mean, rstd, dims, x_dot)
            mean_dot, rstd_dot = mean_dot.flatten(), rstd_dot.flatten()
            n = math.prod(x.shape[d] for d in dims)
            var_dot = -2 * rstd_dot / in_float32(rstd).flatten() ** 3 * n / (n - 1)
            of_batch = [mean_dot, rstd_dot, momentum * mean_dot, momentum * var_dot]
            stats_dot = [b if a is None else a + b for a, b in zip(stats_dot, of_batch)]
    else:
        stats_dot[2:] = running_mean_dot, running_var_dot
        mean, rstd = (per_channel(t, x) for t in (running_mean, (running_var + eps).rsqrt()))
        x_hat_dot = None if x_dot is None else x_dot * rstd
        if running_mean_dot is not None:
            x_hat_dot = (0 if x_hat_dot is None else x_hat_dot) - per_channel(running_mean_dot, x) * rstd
        if running_var_dot is not None:
            shrinks = per_channel(running_var_dot, x) * rstd**3 / 2
            x_hat_dot = (0 if x_hat_dot is None else x_hat_dot) - (x - mean) * shrinks
    y_dot = None if x_hat_dot is None else weighted(x_hat_dot, weight)
    if y_dot is None and weight_dot is None and bias_dot is None:
        return None, *stats_dot
    return affine(y_dot, standard(x, mean, rstd), weight_dot, bias_dot), *stats_dot


@jvp(aten._native_batch_norm_legit_no_training.default)
def batch_norm_eval(
    outs, x, w, b, mean, var, momentum, eps, *, x_dot=None, w_dot=None, b_dot=None, mean_dot=None, var_dot=None
):
    dots = (x_dot, w_dot, b_dot, mean_dot, var_dot)
    return batch_norm(outs, x, w, mean, var, False, momentum, eps, dots)[:3]


@jvp(aten._native_batch_norm_legit_functional.default)
def batch_norm_of_stats(
    outs,
    x,
    w,
    b,
    mean,
    var,
    training,
    momentum,
    eps,
    *,
    x_dot=None,
    w_dot=None,
    b_dot=None,
    mean_dot=None,
    var_dot=None,
):
    return batch_norm(outs, x, w, mean, var, training, momentum, eps, (x_dot, w_dot, b_dot, mean_dot, var_dot))


@jvp(aten.native_batch_norm.default)
def batch_norm_op_by_op(
    outs,
    x,
    w,
    b,
    mean,
    var,
    training,
    momentum,
    eps,
    *,
    x_dot=None,
    w_dot=None,
    b_dot=None,
    mean_dot=None,
    var_dot=None,
):
    """Op by op: the running statistics, which it writes to in training, are looked after there."""
    return batch_norm(outs, x, w, mean, var, training, momentum, eps, (x_dot, w_dot, b_dot, mean_dot, var_dot))[:3]


@jvp(aten._native_batch_norm_legit.no_stats)
def batch_norm_without_stats(outs, x, w, b, training, momentum, eps, *, x_dot=None, w_dot=None, b_dot=None):
    return batch_norm(outs, x, w, None, None, True, momentum, eps, (x_dot, w_dot, b_dot, None, None))[:3]
