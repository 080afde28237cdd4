"""Train members that are spread over two and three ranks; each rank compares them with members in one process."""

from __future__ import annotations

import forks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_rprop import Rprop, Stacked

WORLDS = (2, 3)
# Four members on three ranks are two, two and none.
PLACEMENTS = ((Shard(0), Shard(0)), (Shard(1), Shard(0)), (Replicate(), None))
OPTIONS = (
    {"variant": "irprop+"},
    {"variant": "irprop+", "foreach": False, "weight_decay": 0.1},
    {"variant": "rprop+", "foreach": True, "maximize": True},
    {"variant": "irprop+", "differentiable": True},
)


def train(placements, mesh, differentiable=False, steps=10, **options):
    """Return whole parameters after steps with random gradients and losses, some of them bad."""
    draw = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((4, 3), (4,))]
    places = [(param, place) for param, place in zip(params, placements, strict=True)]
    params = [distribute_tensor(param, mesh, [place]) if place else param for param, place in places]
    params = params if differentiable else [torch.nn.Parameter(param) for param in params]
    optimizer = Rprop(params, lr=0.5, differentiable=differentiable, **options)
    optimizer.shared_loss = True
    for step in range(steps):
        losses = torch.randn(4, generator=draw, dtype=torch.float64)
        losses[step % 4] = (torch.nan, 1.0, torch.inf)[step % 3]
        for param, place in zip(params, placements, strict=True):
            grad = torch.randn(param.shape, generator=draw, dtype=torch.float64)
            param.grad = distribute_tensor(grad, mesh, [place]) if place else grad
        if step % 2 and mesh:  # losses that are spread too
            losses = distribute_tensor(losses, mesh, [Shard(0)])
        optimizer.step(loss=losses)
    whole = [param.full_tensor() if hasattr(param, "full_tensor") else param for param in params]
    kept = [state["prev_loss"] for state in optimizer.state.values() if "prev_loss" in state]
    return [param.detach() for param in whole], kept, int(optimizer.retreats)


def build(mesh=None):
    torch.manual_seed(0)
    net = Stacked(lambda: torch.nn.Linear(3, 2, dtype=torch.float64), 4)
    if mesh:
        fully_shard(net, mesh=mesh)
    optimizer = Rprop(net.parameters(), lr=0.5, variant="irprop+")
    optimizer.shared_loss = True
    return net, optimizer


def fit(net, optimizer, steps):
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    for step in steps:
        optimizer.zero_grad()
        losses = (net(x) - 1).square().mean(dim=(1, 2))
        losses.sum().backward()
        optimizer.step(loss=losses * torch.tensor([1, 1, torch.nan if step % 5 == 3 else 1, 1]))


def resume(folder, mesh=None):
    """Load a checkpoint into a fresh model and optimizer, and return the parameters after more steps."""
    net, optimizer = build(mesh)
    state = dict(zip(("net", "optimizer"), get_state_dict(net, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder, no_dist=mesh is None)
    set_state_dict(net, optimizer, model_state_dict=state["net"], optim_state_dict=state["optimizer"])
    fit(net, optimizer, range(5, 12))
    return [param.full_tensor() if mesh else param for param in net.parameters()]


def compare(rank, world):
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for placements in PLACEMENTS:
        for options in OPTIONS:
            spread, alone = train(placements, mesh, **options), train((None, None), None, **options)
            for a, b in zip(spread[0] + spread[1], alone[0] + alone[1], strict=True):
                assert torch.equal(a, b), (placements, options)
            assert spread[2] == alone[2] > 0
    net, optimizer = build(mesh)
    fit(net, optimizer, range(5))
    state = dict(zip(("net", "optimizer"), get_state_dict(net, optimizer), strict=True))
    dcp.save(state, checkpoint_id=f"checkpoint-{world}")
    torch.save(resume(f"checkpoint-{world}", mesh), f"{world}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for world in WORLDS:
        forks.run(world, compare)
