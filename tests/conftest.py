"""What all tests share: the environment of the processes they start, Ctrl-C as a terminal has it, and their order."""

import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def interrupts():
    """Take SIGINT as Python does by default: a job in the background, as some CI starts one, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def environment(tmp_path_factory):
    """Compile anew, and leave nothing in the user's cache; so do the processes that tests start, with a thread each.

    They are several at once, whose waiting threads would take the time from each other.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def pytest_collection_modifyitems(items):
    """Begin with the longest: at the end, one process would be left alone with it."""
    items.sort(key=lambda item: item.name != "test_under_the_interpreter")
