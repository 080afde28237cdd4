"""The deep Ritz method: a network that minimizes an energy, with Rprop and then LBFGS in a plain PyTorch loop.

The network is a phase field u on [-1, 1] with an interface of width w between the phases u = -1 and u = 1. It minimizes
the energy of Modica and Mortola,

    E(u) = integral of w/2 u'^2 + (1 - u^2)^2 / (4 w),

whose minimum is known up to exp(-2/w): u = tanh(x / (sqrt(2) w)) with E = sqrt(8) / 3. Every step uses all quadrature
points. Rprop runs until it has converged, LBFGS for the rest of the evaluations (6 s on one CPU core).

    python examples/deep_ritz.py
    python examples/deep_ritz.py --evaluations 3000
"""

import argparse

import torch
from matplotlib.figure import Figure

from lightning_rprop import BestWeights, Convergence, Rprop

WIDTH = 0.05
EXACT = 8**0.5 / 3


def solution(net, x):
    """Return u at points ``(n, 1)``; it is odd, because a shifted interface has the same energy."""
    return x + (1 - x.square()) * (net(x) - net(-x))


def energy(net, x):
    """Return E by the midpoint rule, whose error is negligible here because the integrand vanishes at both ends."""
    u = solution(net, x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    density = WIDTH / 2 * slope.square() + (1 - u.square()).square() / (4 * WIDTH)
    return 2 * density.mean()  # the length of [-1, 1] times the mean


def fit(net, x, evaluations):
    """Minimize the energy; return the errors of all evaluations, and how many of them were Rprop's."""
    errors = []
    best = BestWeights(net)

    def closure():
        net.zero_grad()
        loss = energy(net, x)
        loss.backward()
        best.update(loss)
        errors.append(loss.item() / EXACT - 1)
        if len(errors) % 100 == 0:
            print(f"evaluation {len(errors):5}: energy {loss.item():.9f}, relative error {errors[-1]:.1e}", flush=True)
        return loss

    optimizer = Rprop(net.parameters())
    convergence = Convergence(tolerance_change=1e-6)
    while len(errors) < evaluations:
        if convergence.update(optimizer.step(closure), optimizer):
            break
    best.restore()
    first = len(errors)
    print(f"Rprop: {convergence.reason or 'not converged'}", flush=True)
    if first < evaluations:
        rest = evaluations - first
        torch.optim.LBFGS(
            net.parameters(),
            max_iter=rest,  # in a single call of step
            max_eval=rest,
            tolerance_grad=0,
            tolerance_change=0,
            history_size=50,
            line_search_fn="strong_wolfe",
        ).step(closure)
        best.restore()
    print(f"energy {best.loss:.9f}, exact {EXACT:.9f}, relative error {best.loss / EXACT - 1:.1e}")
    return errors, first


def plot(x, u, exact, errors, first, path):
    """Plot the solution next to the exact one, and the error of the energy over the evaluations."""
    fig = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2)
    left.plot(x, exact, color="0.7", linewidth=5, label="exact")
    left.plot(x, u, label="network")
    error = (u - exact).abs().max()
    left.set(xlabel="x", ylabel="u", xticks=(-1, -0.5, 0, 0.5, 1), title=f"Phase field, largest error {error:.1e}")
    left.legend()
    right.plot(range(1, first + 1), errors[:first], label="Rprop")
    right.plot(range(first + 1, len(errors) + 1), errors[first:], label="LBFGS")
    right.set(xlabel="evaluations", yscale="log", title="Relative error of the energy")
    right.legend()
    fig.savefig(path, dpi=100)


def main():
    """Train the network, print the errors and save the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=1000, help="evaluations of the energy (default: 1000)")
    parser.add_argument("--output", default="deep_ritz.png", help="file of the plot (default: deep_ritz.png)")
    arguments = parser.parse_args()
    if arguments.evaluations < 1:
        parser.error(f"--evaluations must be >= 1, got {arguments.evaluations}")

    torch.set_num_threads(1)  # faster for small tensors
    torch.manual_seed(0)
    layers = torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1)
    net = torch.nn.Sequential(*layers).double()
    x = ((torch.arange(400, dtype=torch.float64) + 0.5) / 200 - 1).unsqueeze(1).requires_grad_()
    errors, first = fit(net, x, arguments.evaluations)
    with torch.no_grad():
        u, exact = solution(net, x), (x / (2**0.5 * WIDTH)).tanh()
    print(f"largest error of u {(u - exact).abs().max():.1e}")
    plot(x.detach(), u, exact, errors, first, arguments.output)
    print(f"plot saved to {arguments.output}")


if __name__ == "__main__":
    main()
