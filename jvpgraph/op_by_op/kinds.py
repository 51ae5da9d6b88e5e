"""Ops by what they do with memory, as far as their schemas do not say so."""

from __future__ import annotations

from typing import Any

from torch._ops import OpOverload

EMPTY = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
ZERO = {"zeros", "zeros_like", "new_zeros"}
LIKE = {"ones_like", "full_like", "rand_like", "randn_like", "randint_like", "new_ones", "new_full"}
ABOUT = {"is_same_size", "_has_same_storage_numel", "is_pinned", "record_stream", "set_", "resize_", "lift_fresh"}
METADATA = {"detach", "dim", "numel", "size", "storage_offset", "stride"}
COPIES = {"clone", "_to_copy"}
READS_NOTHING = EMPTY | ZERO | LIKE | ABOUT
DRAWS = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_"}
BATCH_NORMS = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"}  # their arguments differ by name only
OVERWRITES = DRAWS | {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "index_put_", "_index_put_impl_"}
OVERWRITES |= {"scatter_", "index_copy_", "index_fill_", "masked_fill_", "masked_scatter_", "put_", "_unsafe_index_put"}
VOUCHED = {"lift_fresh", "lift", "set_"}  # made of Python's numbers or of a storage, whose escapes are refused


def is_about(func: Any) -> bool:
    """Whether an op asks for sizes and the like, from where nothing may be raised; a detach is autograd's."""
    if not isinstance(func, OpOverload):
        return False
    name = func._schema.name.split("::")[1]
    return func.namespace == "prim" or name in METADATA or name.startswith(("sym_", "is_"))
