"""Physics-informed networks and networks that minimize an energy (deep Ritz)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.problems import Start, mlp, oscillator
from benchmarks.suite.case import Case


def slopes(u: Tensor, points: Tensor) -> Tensor:
    """Return the derivatives of outputs ``(n, 1)`` by their points ``(n, d)``, of shape ``(n, d)``."""
    return torch.autograd.grad(u.sum(), points, create_graph=True)[0]


def grid(*axes: Tensor) -> Tensor:
    """Return all points of a grid, of shape ``(n, d)``, and record operations on them."""
    return torch.cartesian_prod(*axes).reshape(-1, len(axes)).requires_grad_()


def poisson() -> Start:
    """Physics-informed: u_xx + u_yy = f on the unit square, with a penalty for u on its border."""
    net = mlp(2, 20, 20, 1)
    inside, side = (torch.arange(10) + 0.5) / 10, torch.linspace(0, 1, 11)
    points, ends = grid(inside, inside), torch.tensor([0.0, 1.0])
    border = torch.cat([torch.cartesian_prod(side, ends), torch.cartesian_prod(ends, side)])
    x, y = points.detach().split(1, dim=1)
    f = -5 * math.pi**2 * (math.pi * x).sin() * (2 * math.pi * y).sin()

    def loss() -> Tensor:
        du = slopes(net(points), points)
        laplacian = slopes(du[:, :1], points)[:, :1] + slopes(du[:, 1:], points)[:, 1:]
        return (laplacian - f).square().mean() + 100 * net(border).square().mean()

    return list(net.parameters()), loss


def burgers() -> Start:
    """Physics-informed: u_t + u u_x = 0.05 u_xx, u(x, 0) = -sin(pi x), u(-1, t) = u(1, t) = 0."""
    net, double = mlp(2, 20, 20, 1).double(), torch.float64
    x, t = torch.linspace(-1, 1, 16, dtype=double), torch.linspace(0, 1, 8, dtype=double)
    points, ends = grid(x, t), torch.tensor([-1, 1], dtype=double)
    known = torch.cat([torch.cartesian_prod(x, t[:1]), torch.cartesian_prod(ends, t)])
    values = torch.where(known[:, 1:] == 0, -(math.pi * known[:, :1]).sin(), 0)

    def loss() -> Tensor:
        u = net(points)
        u_x, u_t = slopes(u, points).split(1, dim=1)
        residual = u_t + u * u_x - 0.05 * slopes(u_x, points)[:, :1]
        return residual.square().mean() + (net(known) - values).square().mean()

    return list(net.parameters()), loss


def bar() -> Start:
    """Deep Ritz: a bar of 100 mm under a load that varies, on linear elements, in newtons and millimeters."""
    net = mlp(1, 20, 20, 1).double()
    x = torch.linspace(0, 100, 61, dtype=torch.float64).unsqueeze(1)
    middle, h, stiffness = (x[1:] + x[:-1]) / 2, 100 / 60, 2.1e5
    load = 50 * (1 + (middle / 10).sin())

    def loss() -> Tensor:
        u = x * net(x)  # the left end is fixed
        strain = (u[1:] - u[:-1]) / h
        return h * (0.5 * stiffness * strain.square() - load * (u[1:] + u[:-1]) / 2).sum()

    return list(net.parameters()), loss


def phase_field() -> Start:
    """Deep Ritz: the interface between two phases on [-1, 1], a double-well potential and a gradient term."""
    net, width = mlp(1, 20, 20, 1).double(), 0.1
    x = grid(torch.linspace(-1, 1, 100, dtype=torch.float64))

    def loss() -> Tensor:
        u = x + (1 - x.square()) * net(x)  # -1 and 1 at the ends
        well = (1 - u.square()).square() / (4 * width)
        return (0.5 * width * slopes(u, x).square() + well).mean()

    return list(net.parameters()), loss


def membrane() -> Start:
    """Deep Ritz: a membrane under a load on the unit square, on a grid of 20 x 20 cells."""
    net = mlp(2, 20, 20, 1)
    side = torch.linspace(0, 1, 21)
    x, y = torch.meshgrid(side, side, indexing="ij")
    points, border = torch.stack([x, y], dim=2), 16 * x * (1 - x) * y * (1 - y)
    load = 10 * (3 * x).sin() * (5 * y).cos()

    def loss() -> Tensor:
        u = border * net(points).squeeze(2)
        energy = 0.5 * (u.diff(dim=0).square().sum() + u.diff(dim=1).square().sum())
        return energy - (load * u).mean()

    return list(net.parameters()), loss


PINN, RITZ = "physics-informed network", "deep Ritz"
CASES = {
    "oscillator": Case(PINN, "oscillator, 1-20-20-1", oscillator),
    "poisson": Case(PINN, "Poisson equation in 2-D, 2-20-20-1", poisson),
    "burgers": Case(PINN, "Burgers' equation in space and time, 2-20-20-1", burgers),
    "bar": Case(RITZ, "bar in newtons and millimeters, 1-20-20-1", bar),
    "phase-field": Case(RITZ, "phase field with a double well in 1-D, 1-20-20-1", phase_field),
    "membrane": Case(RITZ, "membrane in 2-D, 2-20-20-1", membrane),
}
