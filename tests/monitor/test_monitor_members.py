"""StepSizeMonitor with stacked parameters: statistics over members, and a picture of their losses."""

import math

import pytest
import torch
from fitting import fit
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lit import Recorder, trainer
from members import WAVES, Members, Outputs, stacked
from monitor_plots import curves, legend, make_series
from monitor_runs import CLOSE, quiet_monitor

from lightning_rprop import FullBatch, FullBatchLoader, Rprop
from lightning_rprop.monitor.plot import plot_run, plot_series

pytestmark = pytest.mark.filterwarnings("ignore:The loss of 1 of 3 members was NaN")


def spoil(losses, i):
    """Make the loss of member 1 NaN from the sixth step on."""
    return losses * torch.where((torch.arange(len(losses)) == 1) & (i >= 5), torch.nan, 1.0)


def train(folder, steps=9, maximize=False, callbacks=(), **options):
    """Fit three members; return their losses and the monitor."""
    outputs, monitor = Outputs(), quiet_monitor(every_n_steps=1, per_parameter=True, statistics=["mean", "retreats"])
    module = Members(stacked(3), lambda params: Rprop(params, maximize=maximize), spoil=spoil)
    fit(folder, module, None, WAVES, steps, [outputs, monitor, *callbacks], **options)
    return outputs.values, monitor, module


def drawn(ax):
    """Return the values of each curve, thin ones first."""
    return [[None if math.isnan(y) else y for y in line.get_ydata()] for line in curves(ax)]


def test_statistics_cover_all_members(tmp_path):
    log = Recorder()
    _, _, module = train(tmp_path, logger=log)
    step, metrics = log.records()[-1]
    assert step == 8
    state = module.optimizers().optimizer.state
    sizes = {name: state[param]["step_size"] for name, param in module.named_parameters()}
    expected = {f"step_size/{name}/mean": values.mean().item() for name, values in sizes.items()}
    expected |= {"step_size/mean": torch.cat([*sizes.values()]).mean().item(), "step_size/retreats": 4}
    assert metrics == pytest.approx(expected, **CLOSE)
    assert not any("loss" in name for _, metrics in log.records() for name in metrics)


@pytest.mark.parametrize("maximize", [False, True])
def test_members_are_thin_lines(maximize, tmp_path):
    losses, monitor, _ = train(tmp_path, maximize=maximize)
    fig, (ax, below) = monitor.plot()
    losses = torch.stack(losses)
    seen = losses.nan_to_num(math.inf if not maximize else -math.inf)
    best = int(seen.amax(0).argmax() if maximize else seen.amin(0).argmin())
    order = [*(i for i in range(3) if i != best), best]
    expected = [[None if math.isnan(loss) else loss for loss in losses[:, i].tolist()] for i in order]
    assert drawn(ax) == expected
    *thin, thick = curves(ax)
    assert all(line.get_linewidth() < thick.get_linewidth() for line in thin)
    assert thick.get_color() not in {line.get_color() for line in thin}
    assert legend(ax) == [f"member {best}, the best", "2 others"]
    assert list(thick.get_xdata()) == [*range(9)]
    assert legend(below) == ["net.a", "net.b"]
    fig.canvas.draw()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_losses_of_members_survive_a_resume(tmp_path):
    save = ModelCheckpoint(tmp_path)
    _, half, _ = train(tmp_path, 4, True, [save], enable_checkpointing=True)
    for steps in (4, 6):
        _, resumed, _ = train(tmp_path, steps, True, ckpt_path=save.best_model_path)
        first, second = (monitor.plot()[1][0] for monitor in (half, resumed))
        assert [values[:4] for values in drawn(second)] == drawn(first)
        assert {len(values) for values in drawn(second)} == {steps}
        assert legend(second) == legend(first)  # the best one is that with the highest loss


def test_members_are_drawn_without_full_batch(tmp_path):
    class Plain(Members):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) | self.more

    for more, expected in (({}, 3), ({"member_losses": ["something else"]}, 1)):
        module, monitor = Plain(stacked(3)), quiet_monitor(every_n_steps=1)
        module.more = more
        trainer(tmp_path, [monitor]).fit(module, FullBatchLoader(WAVES))
        assert len(curves(monitor.plot()[1][0])) == expected


def test_one_member_is_an_ordinary_loss(tmp_path):
    monitor = quiet_monitor(every_n_steps=1)
    fit(tmp_path, Members(stacked(1)), None, WAVES, 3, [monitor])
    assert legend(monitor.plot()[1][0]) == ["loss"]


def test_other_losses_are_drawn_with_members():
    members = {f"member_loss/{i}": ([9, 19], values) for i, values in enumerate(([3.0, 2.0], [2.0, 3.0], [4.0, 1.0]))}
    members["member_loss/3"] = ([9, 19], [math.inf, math.inf])
    _, (ax, _) = plot_series(make_series(["a"], val_loss=([19], [5.0]), **members))
    assert legend(ax) == ["member 2, the best", "2 others", "loss", "val_loss"]
    assert len({line.get_color() for line in curves(ax)}) == 4
    _, (ax, _) = plot_series(make_series(["a"], **{"member_loss/3": members["member_loss/3"]}))
    assert legend(ax) == ["loss"]


def test_logged_summary_is_drawn_from_files(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="run")
    losses, _, _ = train(tmp_path, full_batch=FullBatch(log_as="loss"), logger=logger, log_every_n_steps=1)
    _, (ax, _) = plot_run(tmp_path / "run")
    assert legend(ax) == ["loss/max", "loss/median", "loss/min"]
    lowest = torch.stack(losses).nan_to_num(math.inf).amin(1)
    assert drawn(ax)[2] == pytest.approx(lowest.tolist(), rel=1e-6)  # Lightning logs float32
