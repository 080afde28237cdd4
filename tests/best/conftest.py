"""A fixture for tests of BestWeights."""

import pytest

from lightning_rprop.best import weights


@pytest.fixture(params=["host", "device"])
def place(request, monkeypatch):
    """Run a test as on the CPU, and as if the loss were on an accelerator."""
    if request.param == "device":
        monkeypatch.setattr(weights, "_is_on_host", lambda tensor: False)
    return request.param
