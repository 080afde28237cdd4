"""StepSizeMonitor's records in the files of real loggers."""

import csv
import json

import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lit import Batches, Net
from lit import trainer as make_trainer
from monitor_runs import BOUNDS, CLOSE, FLOAT32, NAMES, make_ours, quiet_monitor
from monitor_truth import Truth
from programs import HELPERS, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_rprop import Rprop


def test_csv_and_tensorboard_hold_records(tmp_path):
    truth = Truth()
    loggers = [CSVLogger(tmp_path, "csv", "0"), TensorBoardLogger(tmp_path, "tb", "0")]
    callback = quiet_monitor(per_parameter=True)
    make_trainer(tmp_path, [callback, truth], logger=loggers, log_every_n_steps=3).fit(Net(make_ours), Batches(3))

    with (tmp_path / "csv" / "0" / "metrics.csv").open() as file:
        rows = {int(r["step"]): r for r in csv.DictReader(file) if r["step_size/mean"]}
    assert list(rows) == [2, 5, 8]
    events = EventAccumulator(str(tmp_path / "tb" / "0")).Reload()
    right = {step: truth.expected(step, bounds=BOUNDS, parameters=NAMES) for step in rows}
    assert len(right[8]) == 51
    for name in right[8]:
        scalars = events.Scalars(name)
        assert [s.step for s in scalars] == [2, 5, 8]
        for scalar in scalars:
            assert float(rows[scalar.step][name]) == pytest.approx(right[scalar.step][name], **CLOSE)
            assert scalar.value == pytest.approx(right[scalar.step][name], **FLOAT32)


def test_tensorboard_histograms_are_right(tmp_path):
    truth = Truth()
    logger = TensorBoardLogger(tmp_path, "tb", "0")
    callback = quiet_monitor(histogram=True, per_parameter="net.0.weight")
    make_trainer(tmp_path, [callback, truth], logger=logger, log_every_n_steps=3).fit(Net(make_ours), Batches(3))
    events = EventAccumulator(str(tmp_path / "tb" / "0"), size_guidance={"histograms": 0}).Reload()
    assert set(events.Tags()["histograms"]) == {"step_size/log10", "step_size/net.0.weight/log10"}
    for name, members in (("step_size/log10", NAMES), ("step_size/net.0.weight/log10", NAMES[:1])):
        found = events.Histograms(name)
        assert [h.step for h in found] == [2, 5, 8]
        for h in found:
            sizes = torch.cat([truth.after[h.step][m].flatten() for m in members]).double().log10()
            value = h.histogram_value
            assert value.num == len(sizes) == sum(value.bucket)
            assert value.min <= sizes.min() + 1e-6
            assert value.max >= sizes.max() - 1e-6
            for limit in value.bucket_limit:
                if (sizes - limit).abs().min() > 1e-6:  # float32 may round a closer step size into the next bucket
                    below = sum(n for n, end in zip(value.bucket, value.bucket_limit, strict=True) if end <= limit)
                    assert below == (sizes < limit).sum()
            width = value.bucket_limit[-1] - value.bucket_limit[-2]
            assert value.sum == pytest.approx(sizes.sum().item(), abs=width * len(sizes) / 2)


OFFLINE_RUN = """
import json, sys
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lit import Batches, Net, Recorder
from lit import trainer as make_trainer
from lightning_rprop import Rprop, StepSizeMonitor

folder = sys.argv[1]
wandb = WandbLogger(save_dir=folder, offline=True, project="p")
mlflow = MLFlowLogger("e", tracking_uri=f"file:{folder}/mlflow")
log = Recorder()
monitor = StepSizeMonitor(per_parameter=True, histogram=True, every_n_steps=2)
trainer = make_trainer(folder, [monitor], logger=[wandb, mlflow, log], max_epochs=1)
calls = []
original = wandb.experiment.log
wandb.experiment.log = lambda *args, **kwargs: calls.append((args, kwargs)) or original(*args, **kwargs)
trainer.fit(Net(lambda module: Rprop(module.parameters())), Batches(5))
summary = dict(wandb.experiment.summary)
histogram = summary["step_size/net.0.weight/log10"]
mlflows = {
    key: [(point.step, point.value) for point in mlflow.experiment.get_metric_history(mlflow.run_id, key)]
    for key in log.records()[0][1]
}
wandb.experiment.finish()
print(json.dumps({
    "records": log.records(),
    "wandb": {key: value for key, value in summary.items() if isinstance(value, (int, float))},
    "calls": [len(args[0]) for args, _ in calls if "step_size/mean" in args[0]],
    "histogram": [sum(histogram["values"]), len(histogram["bins"])],
    "mlflow": mlflows,
}))
"""


def test_wandb_and_mlflow_get_each_record(tmp_path):
    """One call per record and logger; histograms go to W&B only. Both loggers write to files."""
    environment = {"MLFLOW_ALLOW_FILE_STORE": "true", "WANDB_SILENT": "true", "PYTHONPATH": str(HELPERS)}
    output = run(tmp_path, "-c", OFFLINE_RUN, tmp_path, environment=environment, timeout=120)
    seen = json.loads(output.splitlines()[-1])
    records = dict(seen["records"])
    assert list(records) == [1, 3]
    assert len(records[1]) == 51
    for key, value in records[3].items():
        assert seen["wandb"][key] == value
        assert seen["mlflow"][key] == [[1, records[1][key]], [3, value]]
    assert seen["wandb"]["trainer/global_step"] == 3
    assert seen["calls"] == [51 + 5 + 1] * 2  # metrics, histograms (overall and of 4 parameters), step
    assert seen["histogram"] == [12, 61]


def test_pytorch_lightning_trainer_is_supported(tmp_path):
    class Foreign(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return Rprop(self.parameters(), lr=0.25)

    logger = pytorch_lightning.loggers.TensorBoardLogger(tmp_path, "tb", "0")
    callback = quiet_monitor(every_n_steps=1, histogram=True)
    trainer = make_trainer(tmp_path, [callback], package=pytorch_lightning, max_epochs=1, logger=logger)
    trainer.fit(Foreign(), Batches(1))
    assert trainer.callback_metrics["step_size/max"].item() == 0.25
    events = EventAccumulator(str(tmp_path / "tb" / "0")).Reload()
    assert events.Scalars("step_size/max")[0].value == 0.25
    assert events.Tags()["histograms"] == ["step_size/log10"]
