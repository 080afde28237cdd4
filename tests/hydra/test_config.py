"""The config dataclasses match the signatures and docstrings of their classes."""

import inspect
import re
from dataclasses import MISSING, fields
from enum import Enum
from pkgutil import resolve_name
from typing import get_args

import pytest

import lightning_rprop
from lightning_rprop import Converged, FullBatch, KeepBest, Rprop, StepSizeMonitor
from lightning_rprop.config import (
    CONFIGS,
    ConvergedConf,
    FullBatchConf,
    KeepBestConf,
    RpropConf,
    StepSizeMonitorConf,
    Variant,
)
from lightning_rprop.optim._rule import AT_FLIP
from lightning_rprop.optim._rule import Variant as VariantName

PAIRS = pytest.mark.parametrize(
    ("cls", "conf"),
    [
        (Rprop, RpropConf),
        (StepSizeMonitor, StepSizeMonitorConf),
        (FullBatch, FullBatchConf),
        (KeepBest, KeepBestConf),
        (Converged, ConvergedConf),
    ],
)


def signature(cls):
    return {n: p.default for n, p in inspect.signature(cls).parameters.items() if n != "params"}


def plain(value):
    return value.value if isinstance(value, Enum) else value


@PAIRS
def test_config_matches_the_signature(cls, conf):
    options = {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(conf)}
    own = {name: plain(value) for name, value in options.items() if not name.startswith("_")}
    assert list(own.items()) == list(signature(cls).items())
    assert options["_target_"] == f"lightning_rprop.{cls.__name__}"
    assert resolve_name(options["_target_"]) is cls
    assert options["_convert_"] == "all"


@PAIRS
def test_docstring_names_each_argument(cls, conf):
    arguments = inspect.getdoc(cls).split("Args:\n")[1].split("\n\n")[0]
    documented = re.findall(r"^    (\w+):", arguments, flags=re.MULTILINE)
    assert [name for name in documented if name != "params"] == list(signature(cls))


def test_variant_names_agree():
    assert [v.value for v in Variant] == [v.name for v in Variant] == list(get_args(VariantName)) == list(AT_FLIP)


def test_configs_and_exports_are_complete():
    optimizers = {"rprop", "rprop_plus", "rprop_minus", "irprop_plus", "irprop_minus"}
    assert set(CONFIGS) == {f"optimizer/{name}" for name in optimizers} | {
        f"callbacks/{name}" for name in ("step_size_monitor", "full_batch", "keep_best", "converged")
    }
    with pytest.raises(AttributeError, match="module 'lightning_rprop' has no attribute 'Rpropp'"):
        lightning_rprop.Rpropp  # noqa: B018
    assert set(lightning_rprop.__all__) <= set(dir(lightning_rprop))
