"""Inverse problems: an enzyme assay, phase retrieval, image registration, an XOR arbiter PUF and a cluster of atoms."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from benchmarks.problems import Start
from benchmarks.suite.case import Case

NOISE = 1e-3  # of the absorbance in the enzyme assay


def absorbance(params: Tensor, substrate: Tensor, inhibitor: Tensor) -> Tensor:
    """Integrate Michaelis-Menten kinetics with a competitive inhibitor, 4 steps of 40 s with Runge-Kutta 4.

    Args:
        params: Maximal rate in mol/(L s), Michaelis and inhibition constants in mol/L, extinction coefficient in L/mol
            for the given path, and background.
        substrate: Concentrations at the start in mol/L, of shape ``(n,)``.
        inhibitor: Concentrations in mol/L, of shape ``(n,)``.

    Returns:
        The absorbance after each step, of shape ``(4, n)``.
    """
    rate, michaelis, inhibition, extinction, background = params
    half, h = michaelis * (1 + inhibitor / inhibition), 40.0

    def speed(s: Tensor) -> Tensor:
        return -rate * s / (half + s)

    states = []
    for _ in range(4):
        k1 = speed(substrate)
        k2 = speed(substrate + h / 2 * k1)
        k3 = speed(substrate + h / 2 * k2)
        substrate = substrate + h / 6 * (k1 + 2 * (k2 + k3) + speed(substrate + h * k3))
        states.append(substrate)
    return extinction * torch.stack(states) + background


def enzyme(logs: bool) -> Start:
    """Fit the five constants of an enzyme assay, in their units or as logarithms, to twelve curves with noise."""
    true = torch.tensor([2e-6, 1e-4, 5e-5, 1.2e3, 0.05], dtype=torch.float64)
    substrate = torch.tensor([5e-5, 1e-4, 2e-4, 4e-4], dtype=torch.float64).repeat(3)
    inhibitor = torch.tensor([0, 5e-5, 2e-4], dtype=torch.float64).repeat_interleave(4)
    data = absorbance(true, substrate, inhibitor)
    data = data + NOISE * torch.randn_like(data)
    first = true * torch.exp(0.5 * torch.randn_like(true))
    params = (first.log() if logs else first).requires_grad_()

    def loss() -> Tensor:
        return (absorbance(params.exp() if logs else params, substrate, inhibitor) - data).square().mean()

    return [params], loss


def phase_retrieval() -> Start:
    """Recover an image of 16 x 16 pixels from the moduli of its Fourier transforms behind four random masks."""
    at = torch.linspace(-1, 1, 16, dtype=torch.float64)
    centers = torch.rand(2, 5, 1, dtype=torch.float64) - 0.5
    blobs = torch.exp(-20 * (at - centers).square())
    image = torch.einsum("bi,bj->ij", *blobs)
    masks = torch.randint(0, 2, (4, 16, 16)) * 2.0 - 1

    def moduli(pixels: Tensor) -> Tensor:
        waves = torch.fft.rfft2(masks * pixels, s=(32, 32), norm="ortho")
        return (waves.real.square() + waves.imag.square() + 1e-6).sqrt()  # smooth at 0

    data = moduli(image)
    pixels = (0.1 * torch.rand(16, 16, dtype=torch.float64)).requires_grad_()
    return [pixels], lambda: (moduli(pixels) - data).square().mean()


def registration() -> Start:
    """Find the affine map between two images of 40 x 40 pixels with smooth blobs."""
    at = torch.linspace(-1, 1, 40)
    centers = 1.2 * torch.rand(2, 8, 1) - 0.6
    image = torch.einsum("bi,bj->ij", *torch.exp(-15 * (at - centers).square()))[None, None]
    identity = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])

    def warp(theta: Tensor) -> Tensor:
        return F.grid_sample(image, F.affine_grid(theta, [1, 1, 40, 40], align_corners=False), align_corners=False)

    fixed = warp(identity + 0.1 * torch.randn(1, 2, 3))
    theta = (identity + 0.02 * torch.randn(1, 2, 3)).requires_grad_()
    return [theta], lambda: (warp(theta) - fixed).square().mean()


def puf() -> Start:
    """Model the XOR of three arbiter PUFs of 32 stages from 2,000 responses (Rührmair et al. 2010)."""
    challenges = torch.randint(0, 2, (2000, 32)) * 2 - 1
    features = torch.cat([challenges.flip(1).cumprod(dim=1).flip(1), torch.ones(2000, 1)], dim=1)
    responses = (features @ torch.randn(33, 3)).sign().prod(dim=1)
    delays = (0.3 * torch.randn(33, 3)).requires_grad_()
    return [delays], lambda: F.softplus(-responses * (features @ delays).prod(dim=1)).mean()


def cluster() -> Start:
    """Relax a disturbed icosahedron of 13 atoms with the Lennard-Jones potential."""
    golden, signs = (1 + math.sqrt(5)) / 2, torch.tensor([-1.0, 1.0], dtype=torch.float64)
    corners = torch.cartesian_prod(torch.zeros(1, dtype=torch.float64), signs, golden * signs)
    atoms = torch.cat([torch.zeros(1, 3, dtype=torch.float64), *(corners.roll(i, dims=1) for i in range(3))])
    positions = (0.55 * atoms + 0.1 * torch.randn(13, 3, dtype=torch.float64)).requires_grad_()
    one, two = torch.triu_indices(13, 13, offset=1)

    def loss() -> Tensor:
        sixth = (positions[one] - positions[two]).square().sum(dim=1) ** -3
        return (4 * (sixth.square() - sixth)).sum() / 13

    return [positions], loss


ODE = "differential equation"
CASES = {
    "enzyme-raw": Case(ODE, "enzyme assay, constants from 2e-6 to 1.2e3", partial(enzyme, False), 1.5 * NOISE**2),
    "enzyme-log": Case(ODE, "enzyme assay, logarithms of the constants", partial(enzyme, True)),
    "phase": Case("inverse problem", "phase retrieval, 16 x 16 pixels", phase_retrieval),
    "registration": Case("inverse problem", "affine registration, 40 x 40 pixels", registration),
    "puf": Case("PUF", "XOR of three arbiter PUFs, 32 stages", puf),
    "cluster": Case("atoms", "Lennard-Jones cluster of 13, relaxation", cluster),
}
