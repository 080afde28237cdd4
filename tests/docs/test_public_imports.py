"""Public names can be imported from every public module, and all other modules are private."""

import pkgutil

import pytest
from programs import run

import lightning_rprop

NAMES = {
    "lightning_rprop": lightning_rprop.__all__,
    "lightning_rprop.best": ["BestWeights", "KeepBest"],
    "lightning_rprop.convergence": ["Converged", "Convergence"],
    "lightning_rprop.optim": ["Rprop", "rprop"],
    "lightning_rprop.full_batch": ["FullBatch", "FullBatchLoader"],
    "lightning_rprop.stacked": ["Stacked"],
    "lightning_rprop.monitor": ["StepSizeMonitor", "plot_run"],
    "lightning_rprop.config": ["ConvergedConf", "FullBatchConf", "KeepBestConf", "RpropConf", "StepSizeMonitorConf"],
}
MODULES = {
    "lightning_rprop.best.callback",
    "lightning_rprop.best.weights",
    "lightning_rprop.convergence.callback",
    "lightning_rprop.convergence.criteria",
    "lightning_rprop.optim.rprop",
    "lightning_rprop.full_batch.callback",
    "lightning_rprop.full_batch.loader",
    "lightning_rprop.monitor.callback",
    "lightning_rprop.monitor.plot",
    "lightning_rprop.monitor.__main__",
    "lightning_rprop.stacked.module",
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_can_be_imported(module, tmp_path):
    """In a new process, because other imports could make a broken one work."""
    code = "import types\n"
    for name in NAMES[module]:
        code += f"from {module} import {name}\nassert not isinstance({name}, types.ModuleType), '{name} is a module'\n"
    code += "import lightning_rprop\n"
    for name in set(NAMES[module]) & set(lightning_rprop.__all__):
        code += f"assert {name} is lightning_rprop.{name}\n"
    run(tmp_path, "-c", code)


def test_other_modules_are_private():
    names = {module.name for module in pkgutil.walk_packages(lightning_rprop.__path__, "lightning_rprop.")}
    public = {name for name in names if "._" not in name.replace(".__main__", ".main")}
    assert public == {*NAMES, *MODULES} - {"lightning_rprop"}
