"""StepSizeMonitor's arguments: errors name the argument, the value and the remedy."""

import numpy as np
import pytest

from lightning_rprop import StepSizeMonitor


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logging_interval": "batch"}, "logging_interval must be 'step', 'epoch' or None, got 'batch'"),
        ({"every_n_steps": 0}, "every_n_steps must be a number of steps >= 1, or None, got 0. Pass an integer"),
        ({"every_n_steps": -1}, "every_n_steps must be .*, got -1"),
        ({"every_n_steps": 2.5}, "every_n_steps must be .*, got 2.5"),
        ({"every_n_steps": 5.0}, "every_n_steps must be .*, got 5.0"),
        ({"every_n_steps": "5"}, "every_n_steps must be .*, got '5'"),
        ({"every_n_steps": True}, "every_n_steps must be .*, got True"),
        ({"every_n_steps": np.True_}, f"every_n_steps must be .*, got {np.True_!r}"),
        ({"every_n_steps": float("inf")}, "every_n_steps must be .*, got inf"),
        (
            {"every_n_steps": 5, "logging_interval": "epoch"},
            "every_n_steps=5 needs logging_interval='step', got 'epoch'. Leave one of them out",
        ),
        (
            {"statistics": ["mean", "mode"]},
            r"statistics must be a list of some of mean, min, .* or quantiles such as 'q10', got \['mean', 'mode'\]",
        ),
        ({"statistics": ["q101"]}, r"quantiles such as 'q10', got \['q101'\]"),
        ({"statistics": ["q-1"]}, r"quantiles such as 'q10', got \['q-1'\]"),
        ({"statistics": "mean"}, r"statistics must be a list of some of .*, got 'mean'. Pass \['mean'\]$"),
        ({"statistics": "mode"}, r"statistics must be a list of some of .*, got 'mode'$"),
        ({"statistics": []}, r"statistics must be a list of some of .*, got \[\]"),
        ({"statistics": None}, "statistics must be a list of some of .*, got None"),
        ({"statistics": [3]}, r"statistics must be a list of some of .*, got \[3\]"),
        ({"statistics": {"mean": True}}, "statistics must be a list of some of .*, got {'mean': True}"),
        ({"statistics": ["mean", "max", "mean"]}, r"name each one once, got .*\. Remove the second 'mean'"),
        ({"per_parameter": 3}, "per_parameter must be True, False, or patterns of parameters' names, got 3. Pass a"),
        ({"per_parameter": None}, "per_parameter must be .*, got None"),
        ({"per_parameter": ""}, "per_parameter must be .*, got ''"),
        ({"per_parameter": ["net.*", ""]}, r"per_parameter must be .*, got \['net.\*', ''\]"),
        ({"per_parameter": [True]}, r"per_parameter must be .*, got \[True\]"),
        ({"per_parameter": b"net.*"}, r"per_parameter must be .*, got b'net.\*'"),
        ({"per_group": "no"}, "per_group must be True or False, got 'no'"),
        ({"per_group": None}, "per_group must be True or False, got None"),
        ({"histogram": "no"}, "histogram must be True or False, got 'no'"),
        ({"histogram": 2}, "histogram must be True or False, got 2"),
        ({"prog_bar": ["median"]}, r"prog_bar must be a list of some of statistics=\['mean', .*got \['median'\]"),
        ({"prog_bar": True}, "prog_bar must be a list .*, got True"),
        ({"prog_bar": "mean"}, r"prog_bar must be a list .*, got 'mean'. Pass \['mean'\]"),
        ({"silence": ["all"]}, r"silence must be a list of some of no_logger, lr_scheduler, .*, got \['all'\]"),
        ({"silence": "lr_scheduler"}, r"silence must be a list of some of .*, got 'lr_scheduler'. Pass \['lr_"),
        ({"silence": None}, "silence must be a list of some of .*, got None"),
    ],
    ids=str,
)
def test_error_names_bad_argument_and_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        StepSizeMonitor(**options)


def test_numpy_values_become_python_values():
    monitor = StepSizeMonitor(every_n_steps=np.int64(5), per_parameter=np.True_, per_group=np.False_)
    assert (type(monitor.every_n_steps), monitor.every_n_steps) == (int, 5)
    assert monitor.per_parameter is True
    assert monitor.per_group is False


def test_iterators_are_read_only_once():
    names = ["mean", "q10"]
    monitor = StepSizeMonitor(
        statistics=iter(names), per_parameter=iter(["a*", "b*"]), prog_bar=iter(names), silence=iter(["no_logger"])
    )
    assert monitor.statistics == monitor.prog_bar == ("mean", "q10")
    assert monitor.per_parameter == ("a*", "b*")
    assert monitor.silence == ("no_logger",)
