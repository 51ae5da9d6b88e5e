"""A teacher of two networks, sharded: processes whose samples have times on both sides of the boundary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from jvpgraph.trainer.model.experts import experts
from jvpgraph.trainer.model.student import repeated_blocks
from tests.distributed.harness import run
from tests.test_experts import BOTH, batch, radians


def of_both_in_processes() -> None:
    """One process asks for high noise, the other for low: FSDP2 gathers in the same order in both."""
    both = experts(**BOTH)
    x, cond = batch(1)
    t = radians([0.95 if dist.get_rank() == 0 else 0.3])
    with torch.no_grad():
        expected = both(x, t, cond)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (*repeated_blocks(both.net), both):
            fully_shard(module, mesh=mesh)
        assert torch.equal(both(x, t, cond), expected)


@pytest.mark.long
def test_processes_ask_the_same_networks() -> None:
    run(2, of_both_in_processes)
