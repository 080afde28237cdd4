"""Fixtures: the environment of subprocesses, SIGINT, accelerators; and the order of the tests."""

import os
import signal

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def interrupts():
    """Restore Python's SIGINT handler: background jobs, as in some CI systems, start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def environment(tmp_path_factory):
    """Use empty kernel caches, not the user's, and one thread per process, because threads that wait take its time."""
    torch.set_num_threads(1)  # tests of threads set their number
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Prepare Triton's interpreter once per launch; version 3.7 does so at each nested call, which doubles the time."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            from triton.runtime.interpreter import InterpretedFunction

            patch.setattr(InterpretedFunction, "__call__", lambda self, *args: self.rewrite()(*args))
        yield


def pytest_runtest_setup(item):
    """Skip tests that need a GPU if there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def pytest_collection_modifyitems(items):
    """Start with the file that has the longest test, so that no worker is left with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_triton.py")


@pytest.fixture
def on_device(monkeypatch):
    """Compare losses and gradients as on an accelerator, where nothing may be copied to the host."""
    for module in ("best.weights", "convergence._small", "convergence.criteria"):
        monkeypatch.setattr(f"lightning_rprop.{module}.is_on_host", lambda tensor: False)


@pytest.fixture(params=["host", "device"])
def place(request):
    """Run a test on the host, and as on an accelerator."""
    if request.param == "device":
        request.getfixturevalue("on_device")
    return request.param
