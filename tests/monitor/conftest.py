"""Draw without a display, and close all figures after each test."""

import matplotlib
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def close_figures(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")  # the plot command sets it; monkeypatch restores it
    yield
    plt.close("all")
