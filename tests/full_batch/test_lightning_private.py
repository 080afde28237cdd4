"""Lightning's private names are used in one file only, and hold for the releases named here."""

import importlib
import inspect
import re
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.trainer import call
from lit import trainer
from whole_set import Regression, make_data

from lightning_rprop import FullBatch, FullBatchLoader, _lightning

ROOT = Path(__file__).parents[2]
OLDEST, NEWEST = "2.5.0", "2.6.6"  # .ci/run tests both callbacks with each of them


def number(version):
    return tuple(map(int, version.split(".")[:2]))


def test_named_releases_are_those_supported():
    claimed = re.search(r'"lightning>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert number(claimed) == number(OLDEST)
    assert number(OLDEST) <= number(lightning.__version__) <= number(NEWEST), "check _lightning.py against this release"
    assert f"lightning=={OLDEST}" in (ROOT / ".ci" / "run").read_text()
    assert f"lightning=={NEWEST}" in (ROOT / "constraints.txt").read_text()


def test_no_other_file_uses_private_names():
    private = re.compile(r"\b(?:trainer|pl_module|strategy|fit_loop|epoch_loop|module|call)\._[a-z]|\b_results\b")
    for path in Path(_lightning.__file__).parent.rglob("*.py"):
        if path.name not in ("_lightning.py", "_lightning_logs.py", "_torch.py"):
            assert not private.findall(path.read_text()), path


def test_private_names_behave_as_expected(tmp_path):
    class Module(Regression):
        seen = ()

        def training_step(self, batch, batch_idx):
            results, connector = self.trainer._results, self.trainer._logger_connector
            self.seen += ((self._current_fx_name, connector._current_fx, results.batch_size),)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            metric = self.trainer._results["training_step.loss"]
            assert metric.is_tensor
            assert metric.meta.on_step
            assert metric.meta.fx == "training_step"
            assert metric.meta.is_mean_reduction
            assert not metric.meta.is_max_reduction
            assert not metric.meta.is_sum_reduction
            assert callable(metric.meta.sync._fn)
            assert metric.meta.sync.should is False
            assert metric.meta.sync.no_op(3, reduce_op="mean") == 3
            mean = float(metric.value / metric.cumulated_batch_size)  # float32 rounding
            assert mean == pytest.approx(float(metric._forward_cache), rel=1e-6)
            assert _lightning.logged_step(self.trainer) == batch_idx

    module = Module(on_step=True, on_epoch=True)
    fitter = trainer(tmp_path, [FullBatch()], max_epochs=1)
    fitter.fit(module, FullBatchLoader(make_data(10), 4))
    assert [name for name, _, _ in module.seen] == ["training_step"] * 3
    assert [name for _, name, _ in module.seen][1:] == ["training_step"] * 2
    assert [samples for _, _, samples in module.seen] == [3.0, 3.0, 4.0]
    for package in ("lightning.pytorch", "pytorch_lightning"):
        launcher = importlib.import_module(f"{package}.strategies.launchers.subprocess_script")
        assert list(inspect.signature(launcher._hydra_subprocess_cmd).parameters) == ["local_rank"]
        assert list(inspect.signature(launcher._launch_process_observer).parameters) == ["child_processes"]
        assert {"subprocess", "_hydra_subprocess_cmd", "_launch_process_observer"} <= {
            *launcher._SubprocessScriptLauncher._call_children_scripts.__code__.co_names,
            *launcher._SubprocessScriptLauncher.launch.__code__.co_names,
        }
        assert launcher._SubprocessScriptLauncher(None, 2, 1).procs == []
    assert callable(call._call_strategy_hook)
    assert callable(call._call_lightning_module_hook)
    assert torch.equal(module._on_before_batch_transfer(torch.ones(2), dataloader_idx=0), torch.ones(2))
