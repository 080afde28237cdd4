"""Runs of many optimizers end with weights whose loss is the lowest of all evaluations."""

import pytest
import torch
from fitting import fit
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from whole_set import Regression, make_data, network

from lightning_rprop import KeepBest, Rprop

VARIANTS = ("irprop-", "irprop+", "rprop-", "rprop+")
OPTIMIZERS = {
    **{f"{variant} lr={lr}": (Rprop, {"variant": variant, "lr": lr}) for variant in VARIANTS for lr in (0.05, 1.0)},
    "max_iter": (Rprop, {"max_iter": 4, "lr": 0.3}),
    "irprop+ max_iter": (Rprop, {"variant": "irprop+", "max_iter": 3, "lr": 0.3}),
    "maximize": (Rprop, {"maximize": True, "lr": 0.3}),
    "torch Rprop": (torch.optim.Rprop, {"lr": 0.3}),
    "LBFGS": (torch.optim.LBFGS, {"max_iter": 3}),
    "LBFGS strong Wolfe": (torch.optim.LBFGS, {"max_iter": 5, "line_search_fn": "strong_wolfe"}),
    "Adam": (torch.optim.Adam, {"lr": 0.3}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.5}),
    "SGD": (torch.optim.SGD, {"lr": 1.0, "momentum": 0.5}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.3}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 1.0}),
}
DATA = make_data(50)
PROBLEMS = {
    "float32": (network, DATA),
    "float64": (lambda: network(nn.Tanh(), nn.Linear(8, 8)).double(), [values.double() for values in DATA]),
}


class Recorded(Regression):
    """Records the loss and the number of steps before each evaluation, and bounds the loss."""

    def __init__(self, optimizer, net):
        make, options = optimizer
        super().__init__(lambda params: make(params, **options), net=net)
        self.seen = []

    def loss(self, batch):
        return (self.net(batch[0]) - batch[1]).square().mean().sqrt().atan()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True)
        self.seen.append((loss.item(), self.trainer.global_step))
        return loss


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("problem", PROBLEMS)
def test_19_optimizers_end_at_their_best(problem, tmp_path):
    make_net, data = PROBLEMS[problem]
    errors = []
    for name, optimizer in OPTIMIZERS.items():
        keep, module = KeepBest(), Recorded(optimizer, make_net())
        mode, best = ("max", max) if name == "maximize" else ("min", min)
        saves = ModelCheckpoint(
            tmp_path, name, monitor="loss", mode=mode, every_n_train_steps=1, save_weights_only=True
        )
        fit(tmp_path, module, None, data, 15, [keep, saves], enable_checkpointing=True)
        losses = [loss for loss, _ in module.seen]
        assert keep.best_loss == best(losses), name
        assert keep.best_step == module.seen[losses.index(keep.best_loss)][1], name
        ended = module.loss(data).detach()
        assert torch.equal(ended.double(), torch.tensor(keep.best_loss, dtype=torch.float64)), name
        module.load_state_dict(torch.load(saves.best_model_path)["state_dict"])
        error = (module.loss(data) - saves.best_model_score).item()
        errors.append(-error if name == "maximize" else error)
    assert len(OPTIMIZERS) == 19
    assert sum(error > 0.1 for error in errors) >= 2  # weights that ModelCheckpoint has saved with a better score
