"""Numba's kernel: its threads, and the memory of a step."""

import os
import threading
from pathlib import Path

import pytest
import torch
from cases import gradients
from numba_programs import STEP, run_code

from lightning_rprop import Rprop
from lightning_rprop.optim import _numba, _threads

LARGE = 4 * _numba._CHUNK


@pytest.fixture
def threads():
    """Use three threads on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("sizes", "allowed", "expected"),
    [([LARGE], 3, 3), ([LARGE], 1, 1), ([1000] * 5, 3, 1), ([LARGE // 8] * 8, 3, 3), ([LARGE // 2], 3, 2), ([0], 3, 1)],
    ids=str,
)
def test_thread_count_depends_on_work(sizes, allowed, expected, threads, monkeypatch):
    torch.set_num_threads(allowed)
    asked = []
    pool = _threads._pool
    monkeypatch.setattr(_threads, "_pool", lambda helpers: asked.append(helpers) or pool(helpers))
    params = [torch.zeros(size, requires_grad=True) for size in sizes]
    optimizer = Rprop(params, fused=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert asked == [expected - 1] * (expected - 1)


def large_run(steps, **options):
    """Return a parameter of several pieces after steps together with a small one."""
    p, small = torch.zeros(LARGE + 7, requires_grad=True), torch.zeros(5, requires_grad=True)
    optimizer = Rprop([small, p], **options)
    for step in range(steps):
        small.grad, p.grad = gradients([small, p], step)
        optimizer.step()
    return p.detach()


def test_concurrent_threads_are_bit_exact(threads):
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
assert helped()
child = os.fork()
if child == 0:  # torch operations with several threads would hang here: OpenMP threads do not survive a fork
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_starts_its_own_threads():
    child, parent = run_code(FORK).splitlines()
    assert child == parent


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
