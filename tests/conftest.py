"""What all tests share: a place of their own for compiled kernels, and Ctrl-C as a terminal has it."""

import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def interrupts():
    """Take SIGINT as Python does by default: a job in the background, as some CI starts one, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def kernel_cache(tmp_path_factory):
    """Compile anew, and leave nothing in the user's cache; processes that tests start find it too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(autouse=True, scope="session")
def interpreted(request, interrupts):
    """The run of the fused tests under Triton's interpreter, beside the others, if its test is among them."""
    if not any(item.name == "test_under_the_interpreter" for item in request.session.items):
        yield None
        return
    from test_triton import start

    with start() as process:
        yield process
        process.kill()
