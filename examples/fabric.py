"""Full-batch Rprop in a Fabric loop on any number of devices, with the exact gradient and loss of all samples.

python examples/fabric.py
fabric run --accelerator=cpu --devices=2 examples/fabric.py
"""

import torch
from lightning.fabric import Fabric
from matplotlib.figure import Figure

from lightning_rprop import FullBatchLoader, Rprop


def fit(fabric, net, optimizer, loader, steps, resume=None):
    """Train up to ``steps`` steps, resume from a checkpoint if one is given, save one, and return the losses."""
    optimizer.shared_loss = True  # evaluate() returns the same number on every process, as irprop+ requires
    net, optimizer = fabric.setup(net, optimizer)
    loader.share(fabric.global_rank, fabric.world_size, fabric.device)
    state = {"net": net, "optimizer": optimizer, "step": 0}
    if resume:
        fabric.load(resume, state)

    def evaluate():
        optimizer.zero_grad()
        total = 0
        for (x, y), size, is_last in loader.micro_batches():
            with fabric.no_backward_sync(net, enabled=not is_last):
                loss = (net(x) - y).square().mean() * (size / loader.num_samples)
                fabric.backward(loss * fabric.world_size)  # because DDP averages over the ranks
            total += loss.detach()
        return fabric.all_reduce(total, reduce_op="sum")

    losses = []
    for step in range(state["step"], steps):
        losses.append(optimizer.step(evaluate))
        if step % 50 == 0:
            fabric.print(f"step {step}, loss {losses[-1]:.2g}", flush=True)
    fabric.save("fabric.ckpt", {**state, "step": steps})
    fabric.print(f"step {steps}, loss {evaluate():.2g}")
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 203).unsqueeze(1)
    net = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
    fabric = Fabric()
    losses = fit(fabric, net, Rprop(net.parameters(), variant="irprop+"), FullBatchLoader((x, x.sin()), 50), steps=300)
    if fabric.is_global_zero:
        fig = Figure(layout="constrained")
        fig.subplots().semilogy(torch.stack(losses).cpu())
        fig.axes[0].set(xlabel="step", ylabel="loss of all samples", title=f"ranks: {fabric.world_size}")
        fig.savefig("fabric.png", dpi=90)
        print("plot saved to fabric.png")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # otherwise torch may abort on exit (torch issue 190489)
