"""The snippets of docs/clients.md print the losses that torch.optim.Rprop gives in the same package."""

import re

import pytest
from pages import read_snippets
from programs import run

SNIPPETS = read_snippets("docs/clients.md")

# Upper bounds of the losses, about twice what the snippets reach.
LOSSES = {
    "poisson.py": 2e-3,
    "gp.py": -0.01,
    "pde.py": 1.5e-3,
    "forecast.py": 8e-3,
    "nodes.py": 0.4,
    "graphs.py": 1.5e-3,
    "regressor.py": 0.45,
}

# Trains with both optimizers in one process, because some packages need seconds for their import. What follows in
# CHECKS uses the names of the snippet's last run.
PROGRAM = """
import runpy, sys
import lightning_rprop, torch
ours = lightning_rprop.Rprop
for optimizer in (torch.optim.Rprop, ours):
    lightning_rprop.Rprop = optimizer
    names = runpy.run_path(sys.argv[1], run_name="__main__")
    assert names["Rprop"] is optimizer
exec(sys.argv[2], names)
"""

# The other claims of the page.
CHECKS = {
    "poisson.py": """
from pina.callback import SwitchOptimizer
adam, rprop = TorchOptimizer(torch.optim.Adam, lr=1e-3), TorchOptimizer(Rprop, lr=1e-3)
for first, second, recorded in ((adam, rprop, [3, 4]), (rprop, adam, [0, 1, 2])):
    monitor = StepSizeMonitor(every_n_steps=1, silence=["lr_scheduler"])
    callbacks = [SwitchOptimizer(second, epoch_switch=3), monitor]
    solver = PINN(problem, net, optimizer=first)
    Trainer(solver, max_epochs=5, accelerator="cpu", callbacks=callbacks).train()
    assert monitor._history.series()["step_size/mean"][0] == recorded
""",
    "gp.py": """
before = loss.item()
optimizer = Rprop(model.parameters(), lr=1e-3, variant="irprop+")
for _ in range(20):
    loss = optimizer.step(closure)
assert loss < before
""",
    "pde.py": """
def fitted(variant, also_the_unknown):
    factor = dde.Variable(1.0)
    points = torch.linspace(0, 1, 11).unsqueeze(1).numpy()
    observed = dde.icbc.PointSetBC(points, torch.sin(torch.pi * torch.tensor(points)).numpy())
    equation = lambda x, u: -dde.grad.hessian(u, x) - factor * torch.sin(torch.pi * x)
    data = dde.data.PDE(interval, equation, [boundary, observed], num_domain=50, num_boundary=2)
    net = dde.nn.FNN([1, 20, 20, 1], "tanh", "Glorot normal")
    model = dde.Model(data, net)
    unknowns = [factor] if also_the_unknown else []
    model.compile(Rprop([*net.parameters(), *unknowns], lr=1e-3, variant=variant), external_trainable_variables=factor)
    model.train(iterations=300, verbose=0)
    return factor.item()


assert fitted("irprop-", False) == 1
assert 5 < fitted("irprop-", True) < 15  # towards pi^2
assert 5 < fitted("irprop+", True) < 15
""",
    "forecast.py": """
def predicted(model):
    return model.predict(10, series=series, verbose=False).values()


assert model.trainer.global_step == model.n_epochs  # not the number of batches
model.save("model.pt")
loaded = NBEATSModel.load("model.pt", trusted=True)
assert (predicted(loaded) == predicted(model)).all()
loaded.fit(series)
assert isinstance(loaded.trainer.optimizers[0], Rprop)
""",
    "nodes.py": """
from lightning import LightningModule, Trainer
from lightning_rprop import FullBatch, FullBatchLoader


class Fit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, graph):
        return torch.nn.functional.cross_entropy(self.net(graph), graph.y)

    def configure_optimizers(self):
        return Rprop(self.parameters())


module, net = Fit(), Net()
net.load_state_dict(module.net.state_dict())
trainer = Trainer(max_epochs=20, accelerator="cpu", callbacks=[FullBatch()])
trainer.fit(module, FullBatchLoader(graph))
optimizer = Rprop(net.parameters())
for _ in range(20):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(graph), graph.y).backward()
    optimizer.step()
for ours, expected in zip(module.net.parameters(), net.parameters(), strict=True):
    assert torch.equal(ours, expected)
try:
    FullBatchLoader([graph, graph])
except ValueError as error:
    assert "Give a DataLoader" in str(error)
else:
    raise AssertionError("a list of graphs was accepted")
""",
    "graphs.py": """
class NodeFit(Fit):
    def training_step(self, graphs):
        return (self.head(self.conv(graphs.x, graphs.edge_index).tanh()) - graphs.x).square().mean()


(whole,) = DataLoader(loader.dataset, batch_size=100)
for make, weight in ((Fit, None), (NodeFit, lambda graphs: graphs.num_nodes)):
    module = make()
    expected = module.training_step(whole).item()
    callback = FullBatch(weight=weight, log_as="loss")
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], log_every_n_steps=1)
    trainer.fit(module, FullBatchLoader(loader))
    assert abs(trainer.callback_metrics["loss"].item() - expected) < 1e-6 * expected  # float32 rounding
""",
    "regressor.py": """
import pickle
from sklearn.model_selection import GridSearchCV

copy = pickle.loads(pickle.dumps(regressor))
for model in (regressor, copy):
    model.partial_fit(x, y[:, None])
assert copy.history[-1, "train_loss"] == regressor.history[-1, "train_loss"]
search = GridSearchCV(regressor, {"optimizer__variant": ["irprop-", "irprop+"], "optimizer__lr": [0.01, 0.001]}, cv=2)
search.fit(x, y[:, None])
assert search.cv_results_["mean_test_score"].min() > 0
""",
}


def test_every_snippet_has_a_bound():
    assert set(SNIPPETS) == set(LOSSES)
    assert set(CHECKS) <= set(SNIPPETS)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_trains_as_with_torch(snippet, tmp_path):
    (tmp_path / snippet).write_text(SNIPPETS[snippet])
    output = run(tmp_path, "-c", PROGRAM, snippet, CHECKS.get(snippet, ""))
    theirs, ours = re.findall(r"^loss (\S+)$", output, flags=re.MULTILINE)
    assert ours == theirs
    assert float(ours) < LOSSES[snippet]
