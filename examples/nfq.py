"""Neural fitted Q iteration (Riedmiller 2005): the mountain car, with Rprop in a plain PyTorch loop.

A car in a valley is too weak to drive straight up the hill to the goal. A network Q learns the cost of the way there.
Each iteration fits Q to all transitions seen so far, the full batch, with a new Rprop and the same weights. BestWeights
keeps the best policy (12 s on one CPU core).

    python examples/nfq.py
"""

import argparse
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from lightning_rprop import BestWeights, Rprop

LOW, HIGH = torch.tensor([-1.2, -0.07]), torch.tensor([0.5, 0.07])  # of position and velocity
VALLEY = torch.stack([torch.linspace(-0.6, -0.4, 41), torch.zeros(41)], dim=1)  # where the car starts
HOLD, COST = 4, 0.02  # steps of the car, and cost, for each decision


def move(states, actions):
    """Hold each action (0 is left, 1 is right) for some steps of the car, in NumPy as any simulator would be."""
    position, velocity = states.numpy().T
    for _ in range(HOLD):
        velocity = np.clip(velocity + 0.001 * (2 * actions.numpy() - 1) - 0.0025 * np.cos(3 * position), -0.07, 0.07)
        velocity = velocity * (position < 0.5)  # a car stops at the goal
        position = np.maximum(position + velocity, -1.2)
        velocity = velocity * (position > -1.2)  # a wall
    return torch.from_numpy(np.stack([position, velocity], axis=1)).float()


def drive(policy, states, decisions=50):
    """Drive a car from each state; return transitions (states, actions, next states), and each car's steps."""
    seen, steps = [], torch.full((len(states),), HOLD * decisions)
    for i in range(decisions):
        actions = policy(states)
        after = move(states, actions)
        is_driving = states[:, 0] < 0.5
        seen.append([part[is_driving] for part in (states, actions, after)])
        steps[is_driving & (after[:, 0] >= 0.5)] = HOLD * (i + 1)
        states = after
    return [torch.cat(parts) for parts in zip(*seen, strict=True)], steps


def fit(net, states, actions, after, evaluations=300):
    """Fit Q to the targets of all transitions."""
    with torch.no_grad():
        targets = (COST + q(net, after).amin(dim=1) * (after[:, 0] < 0.5)).clamp(max=1).unsqueeze(1)
    optimizer = Rprop(net.parameters())
    for _ in range(evaluations):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(q(net, states).gather(1, actions.unsqueeze(1)), targets)
        loss.backward()
        optimizer.step()


def q(net, states):
    """Return the cost of each action, between 0 and 1, of shape ``(n, 2)``."""
    return net(2 * (states - LOW) / (HIGH - LOW) - 1).sigmoid()


@torch.no_grad()
def choose(net, states, randomness=0.0):
    """Return the actions with the lowest cost, some of them replaced by random ones."""
    is_random = torch.rand(len(states)) < randomness
    return torch.where(is_random, torch.randint(2, (len(states),)), q(net, states).argmin(dim=1))


@torch.no_grad()
def plot(net, means, file):
    """Plot the cost of each state with the way from the valley, and the steps to the goal over the iterations."""
    fig = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = fig.subplots(1, 2)
    plane = torch.meshgrid(torch.linspace(-1.2, 0.5, 100), torch.linspace(-0.07, 0.07, 100), indexing="xy")
    steps = q(net, torch.stack(plane, dim=2)).amin(dim=2) * HOLD / COST
    fig.colorbar(left.pcolormesh(*plane, steps, cmap="viridis_r"), ax=left, label="steps to the goal by Q")
    way = drive(partial(choose, net), VALLEY[20:21])[0][0].numpy()
    left.plot(*way.T, "o-", color="tab:red", markersize=3, label="greedy policy from the valley")
    left.set(xlabel="position", ylabel="velocity", title="Learned cost")
    left.legend(loc="lower left", fontsize="small")
    right.plot(range(1, len(means) + 1), means)
    right.set(xlabel="iteration", title="Mean steps to the goal, greedy policy", ylim=0)
    fig.savefig(file, dpi=100)


def main():
    """Learn a policy, print its steps to the goal and save the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=40, help="iterations (default: 40)")
    parser.add_argument("--seed", type=int, default=3, help="seed (default: 3)")
    parser.add_argument("--output", default="nfq.png", help="file of the plot (default: nfq.png)")
    arguments = parser.parse_args()
    if arguments.iterations < 1:
        parser.error(f"--iterations must be >= 1, got {arguments.iterations}")
    torch.set_num_threads(1)  # faster for small tensors
    torch.manual_seed(arguments.seed)
    net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 2))
    best, means = BestWeights(net), []
    transitions, _ = drive(partial(choose, net, randomness=1), LOW + (HIGH - LOW) * torch.rand(20, 2), decisions=25)
    for i in range(1, arguments.iterations + 1):
        fit(net, *transitions)
        means.append(drive(partial(choose, net), VALLEY)[1].double().mean().item())
        best.update(means[-1])
        print(f"iteration {i:3}: {len(transitions[0]):5} transitions, {means[-1]:6.1f} steps to the goal", flush=True)
        more, _ = drive(partial(choose, net, randomness=0.1), LOW + (HIGH - LOW) * torch.rand(4, 2), decisions=25)
        transitions = [torch.cat(parts) for parts in zip(transitions, more, strict=True)]
    best.restore()
    solved = (drive(partial(choose, net), LOW + (HIGH - LOW) * torch.rand(1000, 2))[1] < 200).float().mean()
    print(f"best policy: {best.loss:.1f} steps from the valley; {solved:.1%} of random states lead to the goal")
    plot(net, means, arguments.output)
    print(f"plot saved to {arguments.output}")


if __name__ == "__main__":
    main()
