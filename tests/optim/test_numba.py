"""Numba's kernel: its threads, its cache on disk, and what is done without it."""

import os
import threading
from pathlib import Path

import pytest
import torch
from cases import gradients
from programs import run

from lightning_rprop import Rprop
from lightning_rprop.optim import _machine_code, _numba, _threads

LARGE = 4 * _numba._CHUNK

# A process of its own: one step, or several, and what is asked of it then.
STEP = """
import sys, torch
from lightning_rprop import Rprop
from lightning_rprop.optim._dispatch import fused_for
param = torch.nn.Parameter(torch.zeros(10))
param.grad = torch.ones(10)
optimizer = Rprop([param])
optimizer.step()
assert param.tolist() == [-torch.tensor(0.01).item()] * 10
fused = not isinstance(fused_for(*[param.detach()] * 4, False), str)
print("fused" if fused else "plain", "compiled" if "numba" in sys.modules else "loaded")
"""


def python(code, **environment):
    """Run a program in a process of its own; give what it printed."""
    return run(".", "-c", code, environment=environment, timeout=120).strip()


@pytest.fixture
def threads():
    """Three threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize(
    ("sizes", "allowed", "expected"),
    [([LARGE], 3, 3), ([LARGE], 1, 1), ([1000] * 5, 3, 1), ([LARGE // 8] * 8, 3, 3), ([LARGE // 2], 3, 2), ([0], 3, 1)],
    ids=str,
)
def test_as_many_threads_as_the_work_is_worth_and_torch_allows(sizes, allowed, expected, threads, monkeypatch):
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
    """The parameter of several pieces, after steps beside a small one."""
    p, small = torch.zeros(LARGE + 7, requires_grad=True), torch.zeros(5, requires_grad=True)
    optimizer = Rprop([small, p], **options)
    for step in range(steps):
        small.grad, p.grad = gradients([small, p], step)
        optimizer.step()
    return p.detach()


def test_several_python_threads_at_once(threads):
    expected = large_run(6, foreach=False)
    results = {}
    workers = [threading.Thread(target=lambda i=i: results.update({i: large_run(6, fused=True)})) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results.values())


def test_several_python_threads_at_once_compile_it(tmp_path):
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
    lines = python(program, NUMBA_CACHE_DIR=str(tmp_path)).splitlines()
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
if child == 0:  # no operation of torch's with threads here: they would hang, as OpenMP's do not survive a fork
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
def test_after_a_fork():
    """Threads do not survive it: the child makes its own."""
    of_the_child, of_the_parent = python(FORK).splitlines()
    assert of_the_child == of_the_parent


def test_at_the_end_of_the_interpreter():
    """No thread can be had then: the one that is there does it all."""
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
    assert python(program) == "2.0"


# ------------------------------------------------------------------------------------------------- cache on disk


def test_compiled_once_then_loaded_without_the_compiler(tmp_path):
    place = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert python(STEP, **place) == "fused compiled"
    (file,) = tmp_path.rglob("*.o")
    whole = file.read_bytes()
    assert python(STEP, **place) == "fused loaded"
    assert file.read_bytes() == whole
    # a damaged file is made anew, and nothing else is left there
    for damaged in (whole[:1000], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        assert python(STEP, **place) == "fused compiled"
        assert len(file.read_bytes()) == len(whole)
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == [file]


def test_nowhere_to_write(tmp_path):
    """Each process compiles for itself then. (A file in the folder's place keeps even root from writing.)"""
    occupied = tmp_path / "occupied"
    occupied.write_text("")
    assert python(STEP, NUMBA_CACHE_DIR=str(occupied), XDG_CACHE_HOME=str(occupied)) == "fused compiled"


@pytest.mark.parametrize("variable", ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("folder", ["", ".", "cache", "here"])
def test_cache_folder_does_not_hide_the_package(folder, variable, tmp_path):
    """Empty and relative paths are ignored; a script's own folder may be named."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    environment = {"HOME": str(home), "XDG_CACHE_HOME": "", "NUMBA_CACHE_DIR": ""}
    environment[variable] = str(here) if folder == "here" else folder
    (here / "script.py").write_text(STEP)
    for expected in ("fused compiled", "fused loaded"):
        assert run(here, "script.py", environment=environment, timeout=120).strip() == expected
    (file,) = tmp_path.rglob("*.o")
    assert file.parent == (here if folder == "here" else home / ".cache") / "lightning-rprop"


def test_file_of_another_kernel_is_not_loaded(tmp_path):
    place = {"NUMBA_CACHE_DIR": str(tmp_path)}
    python(STEP, **place)
    (file,) = tmp_path.rglob("rprop_float32-*.o")
    python(
        STEP.replace("torch.zeros(10)", "torch.zeros(10).double()")
        .replace("torch.ones(10)", "torch.ones(10).double()")
        .replace("assert", "#"),
        **place,
    )
    (other,) = tmp_path.rglob("rprop_float64-*.o")
    file.write_bytes(other.read_bytes())
    assert python(STEP, **place) == "fused compiled"
    assert python(STEP, **place) == "fused loaded"


def test_code_without_the_function_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    module = 'define void @"other"() { ret void }'
    with pytest.raises(RuntimeError, match="The compiled code has no function rprop_missing"):
        _machine_code.load("rprop_missing", "source", lambda: ("rprop_missing", module))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("how", ["others", "group", "owner"])
def test_code_that_others_could_write_is_not_loaded(how, what, tmp_path):
    place = {"NUMBA_CACHE_DIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "home")}
    python(STEP, **place)
    (file,) = tmp_path.rglob("*.o")
    assert (file.parent.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    target = file.parent if what == "folder" else file
    if how == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(target, 12345, -1)
    else:
        target.chmod(target.stat().st_mode | (0o002 if how == "others" else 0o020))
    assert python(STEP, **place) == "fused compiled"
    assert python(STEP, **place) == "fused loaded"  # from the next folder, or from the file that replaced it


def test_no_home(tmp_path):
    """As in a container that runs under a number without a name: it does not stop the step."""
    program = "import os; os.environ.clear(); os.getuid = lambda: 54321\n" + STEP
    assert python(program).startswith("fused")


def test_the_package_folder_is_not_written_to(tmp_path):
    folder = Path(_numba.__file__).parent

    def files():
        return {file for file in folder.rglob("*") if "__pycache__" not in file.parts}

    before = files()
    python(STEP, NUMBA_CACHE_DIR=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert files() == before
    assert not list(folder.rglob("*.nbi"))


def test_nothing_is_imported_before_it_is_needed():
    program = """
import sys, torch
import lightning_rprop.optim
print([name for name in ("numba", "llvmlite", "triton", "lightning_rprop.optim._triton") if name in sys.modules])
"""
    assert python(program) == "[]"


# ------------------------------------------------------------------------------------------------- without Numba


WITHOUT = """
import sys, torch, warnings
from lightning_rprop import Rprop
sys.modules[MISSING] = sys.modules["llvmlite.binding"] = None
params = [torch.nn.Parameter(torch.zeros(10, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
for param in params:
    param.grad = torch.ones_like(param)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    Rprop(params, fused=False).step()
    assert not caught
    for _ in range(2):
        Rprop(params).step()
    assert [-round(param[0].item(), 6) for param in params] == [0.03, 0.03]
    try:
        Rprop(params, fused=True)
    except RuntimeError as error:
        print(error)
print(len(caught), caught[0].message)
"""


@pytest.mark.parametrize("missing", ["numba", "llvmlite"])
def test_missing_compiler_is_told_once_and_done_without(missing, tmp_path):
    """As if it were not installed: everything works as before, and fused=True says why it does not."""
    program = WITHOUT.replace("MISSING", repr(missing))
    error, warning = python(program, NUMBA_CACHE_DIR=str(tmp_path)).splitlines()
    assert error.startswith("fused=True, but no fused kernel supports parameter 0: its compiler cannot be imported: ")
    assert missing in error
    assert warning.startswith("1 Rprop cannot use its faster fused kernel, because the compiler cannot be imported: ")
    assert missing in warning
    assert warning.endswith("or set fused=False to silence this warning.")


def test_a_compiler_that_fails_is_told_once_and_done_without(tmp_path):
    program = """
import warnings
from lightning_rprop.optim import _machine_code
def fail(*_):
    raise OSError("no compiler today")
_machine_code.load = fail
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
""" + "\n".join("    " + line for line in STEP.strip().splitlines())
    program += """
    optimizer.step()
print(len(caught), caught[0].message)
"""
    first, second = python(program, NUMBA_CACHE_DIR=str(tmp_path)).splitlines()
    assert first == "plain loaded"
    assert second.startswith("1 Rprop cannot use its faster fused kernel for torch.float32 on cpu: OSError")
    assert second.endswith("no compiler today'). Set fused=False to silence this warning.")


# -------------------------------------------------------------------------------------------------------- memory

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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark of the memory")
def test_a_step_takes_no_memory_of_a_parameters_size():
    megabytes = [
        int(python(MEMORY.replace("OPTIONS", repr(options)))) for options in ({"fused": True}, {"foreach": False})
    ]
    assert megabytes[0] < 2
    assert megabytes[1] > 15  # so that the measure is seen to measure: a parameter has 16
