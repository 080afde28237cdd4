"""Numba's kernel: its threads, and the memory of a step."""

import os
import threading
from pathlib import Path

import pytest
import torch
from cases import gradients
from numba_programs import STEP, run_code

from lightning_rprop import Rprop
from lightning_rprop.optim import _numba, _threads, rprop

CHUNK = _numba._CHUNK
LARGE = 32 * CHUNK

needs_openmp = pytest.mark.skipif(_threads._openmp(os.getpid()) is None, reason="needs Linux and OpenMP")


@pytest.fixture
def threads():
    """Use three threads on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """Record the calls of OpenMP and of the pool with their numbers of threads."""
    found = []
    _numba.load_kernel(torch.float32)  # a kernel that is compiled is checked
    openmp, pool = _threads._openmp(os.getpid()), _threads._pool

    def parallel(kernel, argument, threads, flags):
        found.append(("openmp", threads))
        openmp(kernel, argument, threads, flags)

    monkeypatch.setattr(_threads, "_openmp", lambda process: parallel)
    monkeypatch.setattr(_threads, "_pool", lambda process, others: found.append(("pool", others)) or pool(0, others))
    return found


def fused_step(sizes):
    params = [torch.zeros(size, requires_grad=True) for size in sizes]
    optimizer = Rprop(params, fused=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p == torch.tensor(-0.01)).all() for p in params)


@needs_openmp
@pytest.mark.parametrize(
    ("sizes", "allowed", "expected"),
    [
        ([CHUNK * 2], 3, True),
        ([CHUNK * 2], 1, False),
        ([1000] * 5, 3, False),
        ([CHUNK // 4] * 8, 3, True),
        ([0], 3, False),
    ],
    ids=str,
)
def test_openmp_team_is_torchs(sizes, allowed, expected, threads, calls):
    """The team always has all threads: libgomp ends those that a smaller one does not need."""
    torch.set_num_threads(allowed)
    fused_step(sizes)
    assert calls == [("openmp", 3)] * expected


@pytest.mark.parametrize(
    ("chunks", "allowed", "others"), [(32, 3, 2), (32, 1, 0), (16, 3, 1), (15, 3, 0), (2, 3, 0)], ids=str
)
def test_pool_size_depends_on_work(chunks, allowed, others, threads, calls, monkeypatch):
    monkeypatch.setattr(_threads, "_openmp", lambda process: None)
    torch.set_num_threads(allowed)
    fused_step([CHUNK * chunks])
    assert calls == [("pool", others)] * others


THREADS = """
import os, torch
from lightning_rprop import Rprop
torch.set_num_threads(3)
p = torch.zeros(2_000_000, requires_grad=True)
p.grad = p.detach() + 1  # starts torch's threads
optimizer = Rprop([p], fused=True)
before = sorted(os.listdir("/proc/self/task"))
optimizer.step()
print(len(before) > 2, before == sorted(os.listdir("/proc/self/task")))
"""


@needs_openmp
def test_step_starts_no_threads():
    assert run_code(THREADS) == "True True"


def large_run(steps, **options):
    """Return a parameter of several pieces after steps together with a small one."""
    p, small = torch.zeros(LARGE + 7, requires_grad=True), torch.zeros(5, requires_grad=True)
    optimizer = Rprop([small, p], **options)
    for step in range(steps):
        small.grad, p.grad = gradients([small, p], step)
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("engine", ["openmp", "pool"])
def test_concurrent_threads_are_bit_exact(engine, threads, monkeypatch):
    if engine == "pool":
        monkeypatch.setattr(_threads, "_openmp", lambda process: None)
    expected = large_run(6, foreach=False)
    results = {}
    workers = [threading.Thread(target=lambda i=i: results.update({i: large_run(6, fused=True)})) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results.values())


def test_concurrent_threads_compile_one_file(tmp_path):
    program = (
        "import threading\nstep = "
        + repr(STEP)
        + """
workers = [threading.Thread(target=exec, args=(step, {})) for _ in range(4)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
"""
    )
    lines = run_code(program, NUMBA_CACHE_DIR=str(tmp_path)).splitlines()
    assert lines == ["fused compiled"] * 4
    assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == 1


FORK = """
import os, threading, torch
from lightning_rprop import Rprop
torch.set_num_threads(3)
p = torch.zeros(2_000_000, requires_grad=True)
grads = [torch.randn(2_000_000) for _ in range(4)]
optimizer = Rprop([p], fused=True)
def step(grad):
    p.grad = grad
    optimizer.step()
def helped():
    return any(thread.name.startswith("rprop") for thread in threading.enumerate())
step(grads[0])
assert not helped()
child = os.fork()
if child == 0:  # OpenMP would hang here: its threads do not survive a fork
    assert not helped()
    for grad in grads:
        step(grad)
    assert helped()
    torch.set_num_threads(1)
    print(p.double().sum().item(), optimizer.state[p]["step_size"].double().sum().item(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
for grad in grads:
    step(grad)
torch.set_num_threads(1)
print(p.double().sum().item(), optimizer.state[p]["step_size"].double().sum().item())
"""


@needs_openmp
def test_forked_child_starts_its_own_threads():
    child, parent = run_code(FORK).splitlines()
    assert child == parent


FORK_FIRST = """
import os, torch
torch.set_num_threads(3)
torch.ones(1_000_000) + 1  # starts torch's threads
child = os.fork()
if child == 0:
    from lightning_rprop import Rprop
    params = [torch.zeros(20_000, requires_grad=True) for _ in range(8)]  # operations on one need one thread
    for p in params:
        p.grad = torch.ones_like(p)
    Rprop(params, fused=True).step()
    print("stepped", flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


@needs_openmp
def test_import_in_a_forked_child_steps():
    assert run_code(FORK_FIRST) == "stepped"


def test_step_works_at_interpreter_exit():
    """No thread can be started then, so the main thread does all the work."""
    program = """
import atexit, torch
from lightning_rprop import Rprop
torch.set_num_threads(3)
p = torch.zeros(2_000_000, requires_grad=True)
p.grad = torch.ones_like(p)
optimizer = Rprop([p], fused=True)
optimizer.step()
def late():
    optimizer.step()
    print(p.unique().tolist() == [torch.tensor(-0.022).item()] and optimizer.state[p]["step"].item())
atexit.register(late)
"""
    assert run_code(program) == "2.0"


MEMORY = """
import torch
from lightning_rprop import Rprop
params = [torch.zeros(4_000_000, requires_grad=True) for _ in range(2)]
optimizer = Rprop(params, **OPTIONS)
def step():
    for p in params:
        p.grad = grads
    optimizer.step()
def kilobytes(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
grads = torch.ones(4_000_000)
step()
open("/proc/self/clear_refs", "w").write("5")
before = kilobytes("VmRSS")
step()
print((kilobytes("VmHWM") - before) // 1000)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs of Linux")
def test_fused_step_needs_no_extra_memory():
    megabytes = [
        int(run_code(MEMORY.replace("OPTIONS", repr(options)))) for options in ({"fused": True}, {"foreach": False})
    ]
    assert megabytes[0] < 2
    assert megabytes[1] > 15  # the measurement works: a parameter has 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_16_bits_is_converted(dtype):
    """Each number is a parameter, a gradient, a previous gradient and a step size, and results are rounded."""
    every = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    results = []
    for fused in (True, False):
        generator = torch.Generator().manual_seed(0)
        rows = [every[torch.randperm(1 << 16, generator=generator)] for _ in range(4)]
        rows[3] = rows[3].abs()
        options = {"etaminus": 0.7, "etaplus": 1.3, "step_size_min": 1e-7, "step_size_max": 1e4, "weight_decay": 0.3}
        rprop(*[[row] for row in rows], [torch.zeros(())], fused=fused, **options)
        results.append(rows)
    for kernel, loop in zip(*results, strict=True):
        assert torch.equal(kernel.isnan(), loop.isnan())
        assert torch.equal(*(row.nan_to_num(0.0, torch.inf, -torch.inf).view(torch.uint16) for row in (kernel, loop)))


def test_small_float16_numbers_survive_flushed_denormals():
    """Float16 numbers below 6e-5 are subnormal, but those of float32, in which a step computes, are not."""
    p = torch.zeros(40, dtype=torch.float16, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = Rprop([p], lr=2e-6, fused=True)
    if not torch.set_flush_denormal(True):
        pytest.skip("needs a processor that flushes denormals")
    try:
        optimizer.step()
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(p, torch.full_like(p, -2e-6))
