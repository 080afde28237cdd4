"""The cache key of the monitor's kernels."""

import inspect

from lightning_rprop.monitor import _statistics_cpu as statistics_cpu
from lightning_rprop.monitor import _statistics_kernel as statistics_kernel
from lightning_rprop.optim import _machine_code, _numba_kernel


def test_monitor_kernels_depend_on_both_sources(monkeypatch):
    sources = []
    monkeypatch.setattr(_machine_code, "load", lambda name, source, compile_module: sources.append(source) or 0)
    statistics_cpu.load_kernel.__wrapped__("gradients")
    assert all(inspect.getsource(module) in sources[0] for module in (statistics_kernel, _numba_kernel))
