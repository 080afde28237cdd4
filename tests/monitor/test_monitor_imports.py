"""The public names of lightning_rprop.monitor, which are imported on first use."""

import pytest
from programs import run

import lightning_rprop
from lightning_rprop import monitor
from lightning_rprop.monitor import StepSizeMonitor, plot_run
from lightning_rprop.monitor.plot import plot_run as defined


def test_monitor_exports_its_public_names():
    assert StepSizeMonitor is lightning_rprop.StepSizeMonitor
    assert plot_run is defined
    assert monitor.__all__ == ["StepSizeMonitor", "plot_run"]


def test_unknown_monitor_name_is_refused():
    with pytest.raises(AttributeError, match=r"module 'lightning_rprop\.monitor' has no attribute 'Absent'"):
        _ = monitor.Absent


@pytest.mark.parametrize("name", ["config", "monitor", "monitor.__main__"])
def test_monitor_package_imports_no_torch(name, tmp_path):
    code = (
        f"import sys, lightning_rprop.{name}; print(sorted({{'torch', 'lightning', 'matplotlib'}} & {{*sys.modules}}))"
    )
    assert run(tmp_path, "-c", code).strip() == "[]"


def test_plot_run_works_without_torch(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,step_size/mean\n0,1\n")
    code = """
import sys
sys.modules["torch"] = sys.modules["lightning"] = None
from lightning_rprop.monitor import plot_run
figure, axes = plot_run(".")
print(len(axes))
"""
    assert run(tmp_path, "-c", code, environment={"MPLBACKEND": "agg"}).strip() == "1"
