"""Hydra finds the configs in apps that never import this package, on real command lines."""

import json
from functools import partial
from importlib.metadata import entry_points

import pytest
from hydra.plugins.plugin import Plugin
from programs import run as run_python

APP = """
import json, sys
import hydra
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate

{store}

@hydra.main(version_base="1.3", config_path={config_path!r}, config_name={config_name!r})
def main(cfg):
    early = sorted({{"torch", "lightning", "numpy"}} & set(sys.modules))
    import torch
    net = torch.nn.Linear(2, 1)
    optimizer = instantiate(cfg.optimizer)(net.parameters())
    net(torch.ones(2)).sum().backward()
    optimizer.step(lambda: 1.0)
    torch.save(optimizer.state_dict(), "state.pt")
    group = torch.load("state.pt", weights_only=True)["param_groups"][0]
    group["types"] = {{name: type(value).__name__ for name, value in group.items()}}
    callbacks = [instantiate(c) for c in cfg.get("callbacks", {{}}).values()]
    print(json.dumps({{
        "class": f"{{type(optimizer).__module__}}.{{type(optimizer).__name__}}",
        "group": group,
        "early": early,
        "callbacks": {{type(c).__name__: vars(c) for c in callbacks}},
    }}, default=lambda value: vars(value) if type(value).__name__ == "Convergence" else str(value)))

main()
"""


@pytest.fixture
def app(tmp_path):
    """Return a function that writes an app and returns a function that runs it with arguments."""

    def write(store="", config=True, files=()):
        conf = tmp_path / "conf"
        if config:
            (conf / "optimizer").mkdir(parents=True)
            (conf / "config.yaml").write_text("defaults:\n  - optimizer: adam\n  - _self_\n")
            adam = "_target_: torch.optim.Adam\n_partial_: true\nlr: 0.1\n"
            (conf / "optimizer" / "adam.yaml").write_text(adam)
        for name, text in dict(files).items():
            (conf / name).parent.mkdir(parents=True, exist_ok=True)
            (conf / name).write_text(text)
        path, name = ("conf", "config") if config else (None, None)
        (tmp_path / "app.py").write_text(APP.format(store=store, config_path=path, config_name=name))

        return partial(run_python, tmp_path, "app.py", timeout=120)

    return write


def last_json(output):
    return json.loads(output.strip().splitlines()[-1])


def test_optimizer_config_is_typed_and_plain(app):
    run = app()
    seen = last_json(run("optimizer=rprop", "optimizer.lr=0.05", "optimizer.etas=[0.5,1.3]", "optimizer.maximize=true"))
    assert seen["class"] == "lightning_rprop.Rprop"
    assert seen["early"] == []  # no torch before the job
    group = seen["group"]
    assert (group["lr"], group["etas"], group["step_sizes"]) == (0.05, [0.5, 1.3], [1e-6, 50.0])
    assert group["maximize"] is True
    assert group["variant"] == "irprop-"
    assert set(group["types"].values()) <= {"float", "int", "bool", "str", "NoneType", "tuple", "list"}
    assert group["types"]["etas"] == group["types"]["step_sizes"] == "tuple"
    assert group["types"]["params"] == "list"


def test_callback_configs_take_overrides(app):
    overrides = [
        "callbacks.full_batch.log_as=train/loss",
        "callbacks.step_size_monitor.every_n_steps=3",
        "callbacks.step_size_monitor.statistics=[median,q10]",
        "callbacks.step_size_monitor.silence=[no_logger]",
        "callbacks.step_size_monitor.per_parameter=[net.*]",
        "callbacks.keep_best.restore=false",
        "callbacks.converged.tolerance_change=1e-5",
        "callbacks.converged.tolerance_grad=null",
        "callbacks.converged.patience=3",
    ]
    added = "+callbacks=[step_size_monitor,full_batch,keep_best,converged]"
    seen = last_json(app()("optimizer=rprop", added, "optimizer.retreat=true", *overrides))
    assert seen["group"]["retreat"] is True
    assert seen["callbacks"]["KeepBest"]["restore"] is False
    criteria = seen["callbacks"]["Converged"]["_criteria"]
    assert (criteria["tolerance_change"], criteria["tolerance_grad"], criteria["patience"]) == (1e-5, None, 3)
    full_batch = seen["callbacks"]["FullBatch"]
    assert (full_batch["reduction"], full_batch["weight"], full_batch["log_as"]) == ("mean", None, "train/loss")
    monitor = seen["callbacks"]["StepSizeMonitor"]
    seen = monitor["every_n_steps"], monitor["statistics"], monitor["per_parameter"]
    assert seen == (3, ["median", "q10"], ["net.*"])


def test_app_without_config_files_finds_rprop(app):
    run = app(config=False)
    assert last_json(run("+optimizer=rprop"))["class"] == "lightning_rprop.Rprop"


def test_optimizer_composes_into_a_package(app):
    run = app(files={"model/net.yaml": "defaults:\n  - /optimizer@optimizer: rprop\n"})
    output = run("--cfg", "job", "+model=net", "model.optimizer.lr=0.5")
    assert "lr: 0.5" in output


def test_sweep_over_optimizers_and_rates(app):
    output = app()("-m", "optimizer=rprop,adam", "optimizer.lr=0.05,0.1")
    seen = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [(s["class"].split(".")[-1], s["group"]["lr"]) for s in seen] == [
        ("Rprop", 0.05), ("Rprop", 0.1), ("Adam", 0.05), ("Adam", 0.1),
    ]  # fmt: skip


def test_each_variant_can_be_swept(app):
    run = app()
    names = "optimizer=rprop_minus,rprop_plus,irprop_minus,irprop_plus"
    variants = "optimizer.variant=rprop-,rprop+,irprop-,irprop+"
    for output in (run("-m", names), run("-m", "optimizer=rprop", variants)):
        seen = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        assert [s["group"]["variant"] for s in seen] == ["rprop-", "rprop+", "irprop-", "irprop+"]
        assert {s["class"] for s in seen} == {"lightning_rprop.Rprop"}
        assert {s["group"]["types"]["variant"] for s in seen} == {"str"}


def test_help_lists_the_configs(app):
    output = app()("--help")
    assert "optimizer: adam, irprop_minus, irprop_plus, rprop, rprop_minus, rprop_plus" in output
    assert "callbacks: converged, full_batch, keep_best, step_size_monitor" in output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=abc", ["Value 'abc' of type 'str' could not be converted to Float", "optimizer.lr"]),
        ("optimizer.lr=null", ["field 'optimizer.lr' is not Optional"]),
        ("optimizer.variant=foo", ["Invalid value 'foo', expected one of [irprop-, irprop+, rprop-, rprop+]"]),
        ("optimizer.betas=[1]", ["Key 'betas' not in 'RpropConf'"]),
        ("optimizer.etas=[a,b]", ["could not be converted to Float", "full_key: optimizer.etas"]),
        ("optimizer.maximize=maybe", ["'maybe' is not a valid bool", "optimizer.maximize"]),
        ("callbacks.step_size_monitor.foo=1", ["Key 'foo' not in 'StepSizeMonitorConf'"]),
        ("callbacks.full_batch.prog_bar=3.5", ["Value '3.5' is not a valid bool"]),
        ("callbacks.keep_best.restore=maybe", ["Value 'maybe' is not a valid bool"]),
        ("callbacks.converged.patience=1.5", ["could not be converted to Integer"]),
        ("optimizer.retreat=maybe", ["Value 'maybe' is not a valid bool"]),
    ],
)
def test_bad_override_fails_at_composition(app, override, message):
    added = "+callbacks=[step_size_monitor,full_batch,keep_best,converged]"
    output = app()("optimizer=rprop", added, override, fails=True)
    for part in message:
        assert part in output
    assert "Traceback" not in output


def test_unknown_name_error_lists_the_choices(app):
    output = app()("optimizer=foo", fails=True)
    assert "Could not find 'optimizer/foo'" in output
    assert [line.strip() for line in output.splitlines() if line.startswith("\t")][:6] == [
        "adam", "irprop_minus", "irprop_plus", "rprop", "rprop_minus", "rprop_plus"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=-1", "ValueError: Invalid learning rate: -1.0. lr is"),
        ("optimizer.etas=[1.2,0.5]", "ValueError: Invalid eta values: 1.2, 0.5. etas must be"),
        ("optimizer.step_sizes=[50,1e-6]", "ValueError: Invalid step sizes: 50.0, 1e-06. step_sizes must be"),
    ],
)
def test_bad_value_fails_in_the_optimizer(app, override, message):
    assert message in app()("optimizer=rprop", override, fails=True)


def test_wrong_number_of_values_is_an_error(app):
    output = app()("optimizer=rprop", "optimizer.etas=[0.5]", fails=True)
    by_rprop, by_hydra_1_4 = "ValueError: Invalid eta values: 0.5. etas must be", "full_key: optimizer.etas"
    assert by_rprop in output or by_hydra_1_4 in output


def test_own_file_takes_precedence(app):
    own = "_target_: torch.optim.Rprop\n_partial_: true\nlr: 0.7\nforeach: false\n"
    run = app(files={"optimizer/rprop.yaml": own})
    seen = last_json(run("optimizer=rprop", "+callbacks=step_size_monitor"))
    assert seen["class"] == "torch.optim.rprop.Rprop"
    assert seen["group"]["lr"] == 0.7
    assert "StepSizeMonitor" in seen["callbacks"]


@pytest.mark.parametrize("config", [True, False], ids=["with files", "without files"])
def test_own_store_entry_takes_precedence(app, config):
    own = {"_target_": "torch.optim.Rprop", "_partial_": True, "lr": 0.7}
    run = app(store=f"ConfigStore.instance().store(group='optimizer', name='rprop', node={own})", config=config)
    seen = last_json(run("optimizer=rprop" if config else "+optimizer=rprop", "+callbacks=step_size_monitor"))
    assert seen["class"] == "torch.optim.rprop.Rprop"
    assert seen["group"]["lr"] == 0.7
    assert "StepSizeMonitor" in seen["callbacks"]


def test_own_structured_config_uses_rprop_conf(app):
    store = """
from dataclasses import dataclass, field
from lightning_rprop import RpropConf

@dataclass
class Config:
    optimizer: RpropConf = field(default_factory=lambda: RpropConf(lr=0.25))

ConfigStore.instance().store(name="config", node=Config)
"""
    run = app(store=store, config=False)
    seen = last_json(run("--config-name", "config", "optimizer.maximize=true"))
    assert (seen["group"]["lr"], seen["group"]["maximize"], seen["early"]) == (0.25, True, [])


def test_entry_points_load_the_plugins():
    module = "hydra_plugins.lightning_rprop.config_source"
    plugins = [e.load() for e in entry_points(group="hydra.plugins") if e.module == module]
    assert sorted(p.__name__ for p in plugins) == ["LightningRpropConfigSource", "LightningRpropSearchPath"]
    assert all(issubclass(p, Plugin) for p in plugins)


def test_importing_the_package_imports_no_torch(tmp_path):
    code = (
        "import sys, lightning_rprop, lightning_rprop.config; lightning_rprop.RpropConf; dir(lightning_rprop);"
        "assert not {'torch', 'lightning', 'numpy', 'hydra'} & set(sys.modules), sorted(sys.modules)"
    )
    run_python(tmp_path, "-c", code, timeout=60)
