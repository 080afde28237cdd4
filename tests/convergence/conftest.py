"""A fixture for both branches of the comparisons: on the host, and as on an accelerator."""

import pytest

from lightning_rprop.convergence import _small, criteria


@pytest.fixture
def on_device(monkeypatch):
    """Compare as on an accelerator, where nothing may be copied to the host."""
    monkeypatch.setattr(_small, "is_on_host", lambda tensor: False)
    monkeypatch.setattr(criteria, "is_on_host", lambda tensor: False)


@pytest.fixture(params=["host", "device"])
def place(request):
    """Run a test on the host, and as on an accelerator."""
    if request.param == "device":
        request.getfixturevalue("on_device")
    return request.param
