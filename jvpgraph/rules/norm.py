"""Normalisations, in float32 from the statistics that the primal saved, as ATen's own backward does.

Only the normalised input is in the table; an active weight or bias takes PyTorch's own formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jvpgraph.rules.reduce import in_float32
from jvpgraph.rules.registry import jvp

aten = torch.ops.aten


def weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


def standardized(x: Tensor, mean: Tensor, rstd: Tensor, dims: Any, x_dot: Tensor) -> tuple[Tensor, ...]:
    """Tangents of x_hat = (x - mean) * rstd, of mean and of rstd.

    x_hat_dot = rstd * (x_dot - mean(x_dot) - x_hat * mean(x_hat * x_dot)).
    """
    x, x_dot, mean, rstd = in_float32(x), in_float32(x_dot), in_float32(mean), in_float32(rstd)
    x_hat = (x - mean) * rstd
    mean_dot = x_dot.mean(dims, keepdim=True)
    slope = (x_hat * x_dot).mean(dims, keepdim=True)
    return rstd * (x_dot - mean_dot - x_hat * slope), mean_dot, -rstd * rstd * slope


@jvp(aten.native_layer_norm.default)
def layer_norm(outs, x, shape, weight, *_, x_dot):
    _, mean, rstd = outs
    x_hat_dot, mean_dot, rstd_dot = standardized(x, mean, rstd, tuple(range(-len(shape), 0)), x_dot)
    return weighted(x_hat_dot, weight), mean_dot, rstd_dot


@jvp(aten._fused_rms_norm.default)
def rms_norm(outs, x, shape, weight, eps, *, x_dot):
    """As a layer norm whose mean is zero: r_dot = -r**2 * mean(x_hat * x_dot)."""
    rstd, x, x_dot = in_float32(outs[1]), in_float32(x), in_float32(x_dot)
    x_hat = x * rstd
    slope = (x_hat * x_dot).mean(tuple(range(-len(shape), 0)), keepdim=True)
    return weighted(rstd * (x_dot - x_hat * slope), weight), -rstd * rstd * slope


@jvp(aten.native_group_norm.default)
def group_norm(outs, x, weight, bias, N, C, HxW, group, eps, *, x_dot):
    def grouped(t: Tensor) -> Tensor:
        return t.reshape(N, group, -1)

    _, mean, rstd = outs
    dots = standardized(grouped(x), grouped(mean), grouped(rstd), -1, grouped(x_dot))
    x_hat_dot, mean_dot, rstd_dot = dots[0].reshape(x.shape), dots[1].squeeze(-1), dots[2].squeeze(-1)
    per_channel = None if weight is None else weight.view(-1, *[1] * (x.dim() - 2))
    return weighted(x_hat_dot, per_channel), mean_dot, rstd_dot


@jvp(aten._native_batch_norm_legit_no_training.default)
def batch_norm_eval(outs, x, weight, bias, running_mean, running_var, momentum, eps, *, x_dot):
    """Fixed statistics make it affine."""
    scale = weighted((running_var + eps).rsqrt(), weight)
    return x_dot * scale.view(-1, *[1] * (x.dim() - 2)), None, None


@jvp(aten.native_batch_norm.default, aten._native_batch_norm_legit_functional.default)
def batch_norm(outs, x, weight, bias, running_mean, running_var, training, momentum, eps, *, x_dot):
    """In training as a layer norm over all dims but the channel's. Running statistics are state and get no tangent."""
    shape = [1, -1, *[1] * (x.dim() - 2)]
    scale = None if weight is None else weight.view(shape)
    if not training:
        return weighted(x_dot * (running_var + eps).rsqrt().view(shape), scale), *[None] * (len(outs) - 1)
    dims = [0, *range(2, x.dim())]
    dots = standardized(x, outs[1].view(shape), outs[2].view(shape), dims, x_dot)
    x_hat_dot, mean_dot, rstd_dot = dots[0], dots[1].flatten(), dots[2].flatten()
    return weighted(x_hat_dot, scale), mean_dot, rstd_dot, *[None] * (len(outs) - 3)
