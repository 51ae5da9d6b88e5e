"""AdamW on masters: the same as torch's in float32, more than rounding allows in bfloat16."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from jvpgraph.trainer.model.optimizer import MasterAdamW, learning_rate

SETTINGS = {"lr": 1e-3, "betas": (0.0, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 2)).to(dtype)


def backward(net: nn.Module, seed: int, scale: float = 1.0) -> None:
    dtype = next(net.parameters()).dtype
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    (scale * net(x).float().square().sum()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("foreach", [None, True])
def test_wide_parameters_get_the_very_updates_of_torch(dtype, foreach):
    net = network(dtype)
    twin = copy.deepcopy(net)
    optimizer = MasterAdamW(net.named_parameters(), foreach=foreach, **SETTINGS)
    reference = torch.optim.AdamW(twin.parameters(), foreach=foreach, **SETTINGS)
    assert all(optimizer.masters[name] is p for name, p in net.named_parameters())
    for step in range(1, 6):
        backward(net, step)
        backward(twin, step)
        reference.param_groups[0]["lr"] = lr = learning_rate(step, 1e-3, 3, 10, "cosine")
        optimizer.step(lr)
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
        assert all(p.grad is None for p in net.parameters())
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters()))


def test_masters_of_bfloat16_follow_float32_adamw_on_the_same_gradients():
    net = network(torch.bfloat16)
    twin = network().requires_grad_(True)
    twin.load_state_dict(net.state_dict())
    optimizer = MasterAdamW(dict(net.named_parameters()), **SETTINGS)
    reference = torch.optim.AdamW(twin.parameters(), **SETTINGS)
    for step in range(5):
        backward(net, step)
        for p, q in zip(net.parameters(), twin.parameters()):
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    for (name, p), q in zip(net.named_parameters(), twin.parameters()):
        assert torch.equal(optimizer.masters[name], q)
        assert torch.equal(p, q.bfloat16())
        assert optimizer.masters[name].grad is None


def test_small_updates_of_bfloat16_add_up_which_they_do_not_without_masters():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    bare = nn.Parameter(weight.detach().clone())
    optimizer = MasterAdamW({"weight": weight}, lr=2e-6, weight_decay=0.0)
    without = torch.optim.AdamW([bare], lr=2e-6, betas=(0.0, 0.999), weight_decay=0.0)
    for _ in range(2000):
        weight.grad, bare.grad = torch.ones_like(weight), torch.ones_like(bare)
        optimizer.step()
        without.step()
    assert torch.equal(bare, torch.ones_like(bare)), "the comparison shows nothing: bfloat16 took the updates"
    torch.testing.assert_close(optimizer.masters["weight"], torch.full((4,), 1 - 2000 * 2e-6), atol=1e-4, rtol=0)
    assert (weight < 1).all()


def test_parameters_without_gradient_are_left_alone():
    for dtype in (torch.float32, torch.bfloat16):
        net = network(dtype)
        net[0].bias.requires_grad_(False)
        optimizer = MasterAdamW(net.named_parameters(), **SETTINGS)
        assert "0.bias" not in optimizer.masters
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        backward(net, 0)
        net[2].weight.grad = None
        optimizer.step()
        changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
        assert changed <= {"0.weight", "2.bias"}
        assert changed
        assert optimizer.state_dict()["step"]["2.weight"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_clips(dtype):
    """Also where parameters come from a generator, which is used up after one loop."""
    net = network(dtype)
    optimizer = MasterAdamW(net.named_parameters(), clip_norm=0.5, **SETTINGS)
    backward(net, 0, scale=10)
    norm = optimizer.gradient_norm()
    grads = [p.grad.clone() for p in net.parameters()]
    assert norm.shape == ()
    assert norm.dtype == torch.float32
    assert torch.isclose(norm, torch.cat([g.flatten() for g in grads]).float().norm())
    assert norm > 5
    optimizer.clip(norm)
    assert torch.isclose(optimizer.gradient_norm(), torch.tensor(0.5), rtol=5e-3)
    for p, g in zip(net.parameters(), grads):
        torch.testing.assert_close(p.grad, (g.float() * 0.5 / norm).to(dtype), rtol=1e-2, atol=0)
    small = [p.grad.clone() for p in net.parameters()]
    optimizer.clip(torch.tensor(0.4))
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), small)), "a small gradient was scaled"
    optimizer.clip(torch.tensor(float("nan")))
    assert all(p.grad.isnan().all() for p in net.parameters())


def test_without_a_norm_nothing_is_clipped():
    net = network()
    optimizer = MasterAdamW(net.named_parameters(), **SETTINGS)
    backward(net, 0, scale=10)
    before = optimizer.gradient_norm()
    optimizer.clip(before)
    assert torch.equal(before, optimizer.gradient_norm())


def run(net: nn.Module, optimizer: MasterAdamW, steps: range) -> None:
    for step in steps:
        backward(net, step)
        optimizer.step(1e-4)
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_exact(dtype):
    net = network(dtype)
    optimizer = MasterAdamW(net.named_parameters(), **SETTINGS)
    run(net, optimizer, range(3))
    saved = copy.deepcopy({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    run(net, optimizer, range(3, 6))

    other = network(dtype)
    again = MasterAdamW(other.named_parameters(), **SETTINGS)
    other.load_state_dict(saved["net"])
    again.load_state_dict(saved["optimizer"])
    run(other, again, range(3, 6))
    for name, p in net.named_parameters():
        assert torch.equal(p, other.get_parameter(name))
        assert torch.equal(optimizer.masters[name], again.masters[name])
    if dtype == torch.bfloat16:  # the masters hold what rounding loses: without them the run would be another
        lossy = network(dtype)
        lossy.load_state_dict(saved["net"])
        lost = MasterAdamW(lossy.named_parameters(), **SETTINGS)
        assert any(not torch.equal(lost.masters[n], saved["optimizer"]["masters"][n]) for n in lost.masters)


def test_loading_lists_everything_that_does_not_fit_and_changes_nothing():
    optimizer = MasterAdamW(network(torch.bfloat16).named_parameters(), **SETTINGS)
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(before)
    del state["masters"]["0.weight"]
    state["exp_avg"]["ghost"] = torch.zeros(1)
    state["exp_avg_sq"]["2.bias"] = torch.zeros(3)
    state["masters"]["2.bias"] += 1
    with pytest.raises(ValueError, match="another optimizer") as error:
        optimizer.load_state_dict(state)
    message = str(error.value)
    for line in ("masters.0.weight: missing", "exp_avg.ghost: there is no", "exp_avg_sq.2.bias: float32[3], here"):
        assert line in message
    assert torch.equal(optimizer.masters["2.bias"], before["masters"]["2.bias"])


def test_refuses():
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        MasterAdamW(frozen.named_parameters(), **SETTINGS)
    with pytest.raises(ValueError, match="same name"):
        MasterAdamW([("w", nn.Parameter(torch.ones(1)))] * 2, **SETTINGS)
    with pytest.raises(ValueError, match="clip_norm"):
        MasterAdamW(network().named_parameters(), clip_norm=0.0, **SETTINGS)


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "shards"))
    torch.distributed.destroy_process_group()


def test_sharded_parameters(mesh):
    whole = {"a": torch.randn(4, 3).bfloat16(), "b": torch.randn(5).bfloat16(), "c": torch.randn(2)}
    grads: dict[str, Tensor] = {name: torch.randn_like(value) for name, value in whole.items()}

    def placed(name: str, value: Tensor) -> Tensor:
        if name == "c":
            return value.clone()
        return distribute_tensor(value.clone(), mesh, [Replicate(), Shard(0) if name == "a" else Replicate()])

    plain = {name: nn.Parameter(value.clone()) for name, value in whole.items()}
    sharded = {name: nn.Parameter(placed(name, value)) for name, value in whole.items()}
    results = []
    for parameters, place in ((plain, lambda _, v: v.clone()), (sharded, placed)):
        optimizer = MasterAdamW(parameters, clip_norm=1.0, **SETTINGS)
        for name, p in parameters.items():
            p.grad = place(name, grads[name])
        norm = optimizer.gradient_norm()
        optimizer.clip(norm)
        optimizer.step()
        assert not isinstance(norm, torch.distributed.tensor.DTensor)
        results.append((norm, parameters))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][0], torch.cat([g.float().flatten() for g in grads.values()]).norm())
    for name, p in results[1][1].items():
        full = p.full_tensor() if name != "c" else p
        torch.testing.assert_close(full, results[0][1][name])


def test_learning_rate():
    rates = [learning_rate(step, 2.0, 4, 12, "cosine") for step in range(1, 13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)  # half way down
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.1
    assert [learning_rate(step, 2.0, 2, 9) for step in (1, 2, 3, 9, 99)] == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert learning_rate(1, 2.0, 0, 5, "cosine") == 2.0
    with pytest.raises(ValueError, match="counted from 1"):
        learning_rate(0, 1.0, 1, 2)
    with pytest.raises(ValueError, match="shape"):
        learning_rate(1, 1.0, 1, 2, "linear")
