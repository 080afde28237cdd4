"""The kernels on a GPU: their check, the bits of the CPU, CUDA graphs, and no wait for the device."""

import pytest
import torch
from cases import DTYPES, VARIANTS, dense_parameters, gradients, parameters, same_bits, take_dense_steps

from lightning_rprop import Rprop
from lightning_rprop.optim import _dispatch
from lightning_rprop.optim._foreach import update_foreach
from lightning_rprop.optim._self_check import check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_kernels_pass_their_check_on_a_gpu(dtype):
    from lightning_rprop.optim._triton import update_triton

    param = torch.zeros(3, dtype=dtype, device="cuda")
    check(update_foreach, dtype, param.device)
    check(update_triton, dtype, param.device)
    assert _dispatch.fused_for(*[param] * 4) is update_triton


def assert_same_steps(on_gpu, on_cpu, losses, **options):
    """Assert that fused steps on the GPU give the bits of the plain loop on the CPU."""
    ours, plain = Rprop(on_gpu, fused=True, **options), Rprop(on_cpu, foreach=False, **options)
    for step, loss in enumerate(losses):
        take_dense_steps(ours, on_gpu, 1, step, loss=torch.tensor(loss, device="cuda"))
        take_dense_steps(plain, on_cpu, 1, step, loss=torch.tensor(loss))
    for p, q in zip(on_gpu, on_cpu, strict=True):
        assert same_bits(p.detach().cpu(), q.detach())
        for key, value in plain.state[q].items():
            assert same_bits(ours.state[p][key].cpu(), value), key


def to_gpu(params):
    return [p.detach().cuda().requires_grad_() for p in params]


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_gpu_steps_match_plain_cpu_steps(variant):
    for dtype in DTYPES:
        for options in ({}, {"weight_decay": 0.3, "maximize": True}):
            params = dense_parameters(dtype)
            assert_same_steps(to_gpu(params), params, [3.0, 2.0, 4.0, 4.0, torch.nan, 5.0], variant=variant, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_members_on_gpu_match_the_cpu(variant):
    """Also members that are larger than a block of the kernel."""
    losses = [[3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [torch.nan, 4.0, 0.0], [1.0, 1.0, torch.inf], [2.0, 1.0, 1.0]]
    for dtype in DTYPES[:4]:
        params = [torch.ones(3, *shape, dtype=dtype).requires_grad_() for shape in ((), (7,), (0, 2), (5, 999))]
        assert_same_steps(to_gpu(params), params, losses, variant=variant)


def test_fused_step_does_not_wait_for_the_gpu():
    params = to_gpu([torch.zeros(50), torch.zeros(3000)])
    optimizer = Rprop(params, fused=True, variant="irprop+")
    loss = torch.ones((), device="cuda")
    sets = [[torch.full_like(p, sign) for p in params] for sign in (1.0, -1.0)]
    for step in range(6):
        for p, gradient in zip(params, sets[step % 2], strict=True):
            p.grad = gradient
        torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
        try:
            optimizer.step(loss=loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_capture_leaves_the_check_to_later_steps(monkeypatch):
    (param,) = to_gpu([torch.zeros(7)])
    param.grad = torch.ones_like(param)
    optimizer = Rprop([param], capturable=True, fused=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        optimizer.step()  # creates the state
    torch.cuda.synchronize()
    monkeypatch.setattr(_dispatch, "_loaded", {})
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")  # torch warns about an empty graph
        with pytest.raises(RuntimeError, match="make a step before the capture"):
            optimizer.step()
    assert not _dispatch._loaded
    optimizer.step()
    assert _dispatch._loaded.keys() == {(param.device, param.dtype)}
    assert optimizer.state[param]["step"].item() == 2


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"foreach": True}, {"capturable": True}], ids=str)
def test_cuda_matches_cpu_exactly(options):
    gpu, cpu = ([p for d in (torch.float32, torch.bfloat16) for p in parameters(d)] for _ in range(2))
    gpu = [p.detach().cuda().requires_grad_() for p in gpu]
    a, b = Rprop(gpu, **options), Rprop(cpu)
    for step in range(20):
        for p, q, g in zip(gpu, cpu, gradients(cpu, step), strict=True):
            p.grad, q.grad = g.cuda(), g
        loss = torch.tensor(float("nan") if step in (5, 9, 10) else 1.0)
        a.step(loss=loss.cuda())
        b.step(loss=loss)
    assert all(torch.equal(p.cpu(), q) for p, q in zip(gpu, cpu, strict=True))
    assert a.retreats.item() == b.retreats.item() == 3


def test_cuda_graph_matches_eager_steps():
    params = [p.detach().cuda().requires_grad_() for p in parameters(torch.float32)]
    plain = [p.detach().clone().requires_grad_() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    refused = Rprop(params)
    optimizer, eager = Rprop(params, capturable=True), Rprop(plain)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")  # torch warns about an empty graph
        with pytest.raises(RuntimeError, match="Construct Rprop with capturable=True"):
            refused.step()
    stream, loss = torch.cuda.Stream(), torch.ones((), device="cuda")
    with torch.cuda.stream(stream):
        optimizer.step(loss=loss)  # creates the state
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step(loss=loss)
    for step in range(10):
        for p, q, g in zip(params, plain, gradients(plain, step), strict=True):
            p.grad.copy_(g)
            q.grad = g.cuda()
        loss.fill_(float("nan") if step in (3, 4) else 1.0)
        graph.replay()
        eager.step(loss=loss)
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))
    assert optimizer.retreats.item() == eager.retreats.item() == 2
