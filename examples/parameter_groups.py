"""Two parameter groups: physical constants of 1e-6 per second next to a network, with Rprop in a plain PyTorch loop.

A substance flows into a lake and decays at rate k1 into a second one, which decays at rate k2. Noisy concentrations a
and b of both are measured for 30 days. The rates are unknown, and so is the inflow, for which a network is fitted:

    a' = inflow(t) - k1 a,    b' = k1 a - k2 b.

Rprop's lr and step_sizes are in the unit of the parameters. The defaults (1e-2, and 1e-6 to 50) suit the weights of a
network, so the rates are a group with their own. One group for all is shown for comparison (13 s on one CPU core).

    python examples/parameter_groups.py
    python examples/parameter_groups.py --evaluations 3000
"""

import argparse

import torch
from matplotlib.figure import Figure
from torch import nn

from lightning_rprop import BestWeights, Rprop

DAY = 86400.0  # seconds
TIMES = torch.linspace(0, 30 * DAY, 61, dtype=torch.float64)
RATES = torch.tensor([3e-6, 8e-7], dtype=torch.float64)  # k1 and k2, per second
START = torch.tensor([1e-6, 2e-6], dtype=torch.float64)
INFLOW = 0.5 * torch.exp(-((TIMES / DAY - 10) / 5).square()) / DAY  # mg/l per second


def simulate(inflow, rates):
    """Return the concentrations, of shape ``(times, 2)``."""
    k1, k2 = rates
    step = TIMES[1] - TIMES[0]
    matrix = torch.stack([torch.stack([-k1, 0 * k1]), torch.stack([k1, -k2])])
    decay = torch.linalg.matrix_exp(step * matrix)
    added = torch.stack([inflow, 0 * inflow], dim=1) * step / 2  # the trapezoidal rule
    states = [torch.zeros(2, dtype=torch.float64)]
    for i in range(len(TIMES) - 1):
        states.append(decay @ (states[-1] + added[i]) + added[i + 1])
    return torch.stack(states)


def predict(net):
    """Return the inflow by the network, in mg/l per second."""
    return nn.functional.softplus(net((TIMES / TIMES[-1] * 2 - 1).unsqueeze(1))).squeeze(1) / DAY


def fit(name, data, make, evaluations):
    """Fit the inflow and the rates; return the network, the rates, and the rates at each evaluation."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    rates = nn.Parameter(START.clone())
    optimizer = make(net, rates)
    best, path = BestWeights([*net.parameters(), rates]), []
    for i in range(1, evaluations + 1):
        optimizer.zero_grad()
        loss = (simulate(predict(net), rates) - data).square().mean()
        loss.backward()
        best.update(loss)
        path.append(rates.detach().clone())
        optimizer.step(loss=loss)
        if i % 250 == 0:
            print(f"{name}: evaluation {i:5}, loss {loss.item():.1e}", flush=True)
    best.restore()
    k1, k2 = rates.tolist()
    print(f"{name}: k1 {k1:.2e}, k2 {k2:.2e} per second, loss {best.loss:.1e}", flush=True)
    return net, rates.detach(), torch.stack(path)


FITS = {
    "two groups": lambda net, rates: Rprop(
        [{"params": net.parameters()}, {"params": [rates], "lr": 1e-7, "step_sizes": (1e-12, 1e-6)}]
    ),
    "one group": lambda net, rates: Rprop([*net.parameters(), rates]),
}


@torch.no_grad()
def plot(data, results, file):
    """Plot the fit of the data, the inflow, and the rates over the evaluations."""
    fig = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    net, rates, _ = results["two groups"]
    for name, measured, fitted in zip("ab", data.T, simulate(predict(net), rates).T, strict=True):
        (points,) = left.plot((TIMES / DAY).numpy(), measured.numpy(), ".", label=name)
        left.plot((TIMES / DAY).numpy(), fitted.numpy(), color=points.get_color())
    left.set(xlabel="days", ylabel="mg/l", title="Data, and fit with two groups")
    middle.plot((TIMES / DAY).numpy(), (INFLOW * DAY).numpy(), color="0.7", linewidth=5, label="truth")
    for (name, (net, _, path)), style in zip(results.items(), ("-", ":"), strict=True):
        middle.plot((TIMES / DAY).numpy(), (predict(net) * DAY).numpy(), style, label=name)
        error = ((path - RATES) / RATES).abs().amax(dim=1)
        right.plot(range(1, len(path) + 1), error.numpy(), style, label=name)
    middle.set(xlabel="days", ylabel="mg/l per day", title="Inflow by the network")
    right.set(xlabel="evaluations", yscale="log", title="Largest relative error of k1 and k2")
    for axes in (left, middle, right):
        axes.legend()
    fig.savefig(file, dpi=90)


def main():
    """Fit with two groups and with one, print the rates and save the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=1500, help="evaluations of each fit (default: 1500)")
    parser.add_argument("--output", default="parameter_groups.png", help="file (default: parameter_groups.png)")
    arguments = parser.parse_args()
    if arguments.evaluations < 1:
        parser.error(f"--evaluations must be >= 1, got {arguments.evaluations}")
    torch.set_num_threads(1)  # faster for small tensors
    torch.manual_seed(1)
    data = simulate(INFLOW, RATES)
    data = data + 0.01 * torch.randn_like(data)
    print("truth: k1 {:.2e}, k2 {:.2e} per second".format(*RATES.tolist()))
    results = {name: fit(name, data, make, arguments.evaluations) for name, make in FITS.items()}
    plot(data, results, arguments.output)
    print(f"plot saved to {arguments.output}")


if __name__ == "__main__":
    main()
