"""StepSizeMonitor with parameters that join the optimizer, or get their shape, during a run."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning
from lit import Batches, Net, Recorder
from lit import trainer as make_trainer
from monitor_truth import DEFAULT, Truth

from lightning_rprop import Rprop, StepSizeMonitor
from lightning_rprop.monitor._warnings import TOPICS

HEAD, BACKBONE = ("net.weight", "net.bias"), ("backbone.weight", "backbone.bias")


class Staged(Net):
    """A backbone and a head; the optimizer gets the parameters that are trainable at the start."""

    def __init__(self):
        super().__init__(lambda m: Rprop([p for p in m.parameters() if p.requires_grad], lr=0.1))
        self.backbone, self.net = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.net(self.backbone(batch).tanh()).square().mean()


class Joining(pl.Callback):
    """Freeze the backbone, and add its parameters to the optimizer before the third step."""

    def setup(self, trainer, pl_module, stage):
        pl_module.backbone.requires_grad_(False)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            pl_module.backbone.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": [*pl_module.backbone.parameters()], "name": "late"})


def fit(tmp_path, module, callbacks, batches=5, epochs=1, **options):
    """Return the records, and the truth to compare them with."""
    log, truth = Recorder(), Truth()
    monitor = StepSizeMonitor(every_n_steps=1, silence=TOPICS, **options)
    make_trainer(tmp_path, [*callbacks, truth, monitor], logger=log, max_epochs=epochs).fit(module, Batches(batches))
    return log.records(), truth


@pytest.mark.parametrize(
    ("chosen", "logged"),
    [(True, (*HEAD, *BACKBONE)), ("backbone.*", BACKBONE), (["*.bias"], ("net.bias", "backbone.bias"))],
    ids=str,
)
def test_parameters_are_logged_once_they_join(chosen, logged, tmp_path):
    records, truth = fit(tmp_path, Staged(), [Joining()], per_parameter=chosen, per_group=True)
    assert [step for step, _ in records] == [*range(5)]
    for step, metrics in records:
        late = step >= 2
        names = [name for name in logged if late or name in HEAD]
        groups = {"group0": HEAD, **({"late": BACKBONE} if late else {})}
        right = truth.expected(step, parameters=names, groups=groups)
        assert list(metrics) == list(right)
        assert metrics == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize("chosen", [True, "backbone.*"], ids=str)
def test_unfrozen_backbone_is_logged(chosen, tmp_path):
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)
    records, truth = fit(tmp_path, Staged(), [finetuning], 2, 2, per_parameter=chosen, statistics=["mean"])
    logged = [{name for name in BACKBONE if f"step_size/{name}/mean" in metrics} for _, metrics in records]
    assert logged == [set(), set(), {*BACKBONE}, {*BACKBONE}]
    for name in BACKBONE:
        mean = truth.after[3][name].mean(dtype=torch.float64).item()
        assert records[3][1][f"step_size/{name}/mean"] == pytest.approx(mean, rel=1e-12)


def test_new_layer_is_logged_by_name(tmp_path):
    class Growing(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.net.append(torch.nn.Linear(1, 1))
                self.trainer.optimizers[0].add_param_group({"params": [*self.net[3].parameters()]})

    module = Growing(lambda m: Rprop(m.parameters(), lr=0.1))
    records, _ = fit(tmp_path, module, [], 3, per_parameter="net.?.bias", statistics=["max"])
    assert ["step_size/net.3.bias/max" in metrics for _, metrics in records] == [False, True, True]


def test_unmatched_pattern_error_shortens_names(tmp_path):
    module = Staged()
    module.more = torch.nn.ParameterList(torch.zeros(1) for _ in range(30))
    with pytest.raises(MisconfigurationException, match=r"'head.\*' matches none .*: net.weight, .* and 14 more$"):
        fit(tmp_path, module, [Joining()], per_parameter=["net.*", "head.*"])


def test_tensor_outside_the_module_is_logged(tmp_path):
    """It has no name in the module, but patterns match the name that it is logged by."""

    class Outside(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.optimizers().param_groups[1]["params"][0].square()

    def make(module):
        return Rprop([{"params": module.parameters()}, {"params": [torch.ones((), requires_grad=True)]}], lr=0.1)

    log, monitor = Recorder(), StepSizeMonitor(per_parameter="*group1.0", statistics=["max"], silence=TOPICS)
    make_trainer(tmp_path, [monitor], logger=log, max_epochs=1, log_every_n_steps=1).fit(Outside(make), Batches(1))
    assert log.records()[0][1].keys() == {"step_size/max", "step_size/optimizer0.group1.0/max"}


@pytest.mark.parametrize("chosen", [True, "net.*"], ids=str)
def test_lazy_parameters_are_measured(chosen, tmp_path):
    """Even if some are never used, and never get a shape."""

    class Lazy(Net):
        def __init__(self):
            super().__init__(lambda m: Rprop(m.parameters(), lr=0.1, weight_decay=0.01))
            layers = torch.nn.LazyLinear(4), torch.nn.LazyBatchNorm1d(), torch.nn.Tanh(), torch.nn.LazyLinear(1)
            self.net, self.unused = torch.nn.Sequential(*layers), torch.nn.LazyLinear(2)

    names = (*DEFAULT, "median", "std_log10")
    used_names = [f"net.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")]

    class UsedTruth(Truth):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, Used(optimizer))

    class Used:
        def __init__(self, optimizer):
            group = optimizer.param_groups[0]
            self.state = optimizer.state
            self.param_groups = [group | {"params": [p for p in group["params"] if p.grad is not None]}]

    log, truth = Recorder(), UsedTruth()
    monitor = StepSizeMonitor(
        every_n_steps=1, silence=TOPICS, statistics=names, per_parameter=chosen, histogram=True, per_group=True
    )
    make_trainer(tmp_path, [truth, monitor], logger=log, max_epochs=1).fit(Lazy(), Batches(4))
    assert [step for step, _ in log.records()] == [*range(4)]
    for step, metrics in log.records():
        right = truth.expected(step, names, parameters=used_names, groups={"group0": used_names})
        assert metrics == pytest.approx(right, rel=1e-6)  # the monitor takes logarithms in float32
