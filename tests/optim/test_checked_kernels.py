"""Fused kernels are checked before they are used, once, and a wrong one is refused.

These tests run with Numba's kernel. test_triton.py runs them with Triton's.
"""

import warnings
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from cases import INTERPRETED, assert_same, parameters, train
from mutation import fused_kernel, mutate

from lightning_rprop import Rprop
from lightning_rprop.optim import _dispatch, _numba

# An error that steps of irprop- do not show.
WRONG = (
    ("distance = tl.where(flipped & take_back, before, step_size)", "distance = step_size")
    if INTERPRETED
    else ("distance = before if flipped and take_back else step_size", "distance = step_size")
)


@pytest.fixture
def cache_folder(monkeypatch, tmp_path):
    """Load kernels as in a new process with an empty cache."""
    for variable in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    forget(monkeypatch)
    return tmp_path


def forget(monkeypatch):
    monkeypatch.setattr(_dispatch, "_loaded", {})
    monkeypatch.setattr(_numba, "load_kernel", cache(_numba.load_kernel.__wrapped__))


@pytest.fixture
def checks(monkeypatch):
    """Record the dtypes that are checked."""
    place = _dispatch if INTERPRETED else _numba
    check, checked = place.check, []
    monkeypatch.setattr(place, "check", lambda *args: checked.append(args[1]) or check(*args))
    return checked


def files(folder):
    return [file for file in folder.rglob("*") if file.is_file()]


def test_wrong_fused_kernel_is_refused(cache_folder, monkeypatch):
    mutant, name = mutate(fused_kernel, WRONG), "update_triton" if INTERPRETED else "compile_kernel"
    with monkeypatch.context() as patch:
        patch.setattr(fused_kernel, name, getattr(mutant, name))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runs = [train(Rprop, parameters(torch.float32), 3) for _ in range(2)]
        (text,) = (str(warning.message) for warning in caught if warning.category is UserWarning)
        assert text.startswith("Rprop cannot use its fused kernel for torch.float32 on cpu: RuntimeError(")
        assert "a parameter becomes " in text
        assert " It uses its plain loop unless fused=True. " in text
        assert text.endswith("Report this to lightning_rprop, and set fused=False to silence this warning.")
        with pytest.raises(RuntimeError, match="parameter 0: its kernel failed: RuntimeError"):
            train(Rprop, parameters(torch.float32)[:1], 1, fused=True)
        runs.append(train(Rprop, parameters(torch.float32), 3, fused=False))
    for run in runs[1:]:
        assert_same(run, runs[0])
    assert not files(cache_folder)
    forget(monkeypatch)
    train(Rprop, parameters(torch.float32)[:1], 1, fused=True)
    assert len(files(cache_folder)) == (0 if INTERPRETED else 1)


def test_fused_kernel_is_checked_once(cache_folder, checks, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        train(Rprop, parameters(dtype)[:3], 2, fused=True)
    assert checks == [torch.float32, torch.bfloat16]
    if not INTERPRETED:  # loaded code was checked when it was compiled
        forget(monkeypatch)
        train(Rprop, parameters(torch.float32)[:3], 2, fused=True)
        assert len(checks) == 2


def test_capture_postpones_the_check(monkeypatch):
    """The check must not become part of a CUDA graph, and a graph must not contain an unchecked kernel."""

    def fail(*_):
        raise RuntimeError("wrong")

    monkeypatch.setattr(_dispatch, "_loaded", {})
    monkeypatch.setattr(_dispatch, "check", fail)
    param = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, is_cuda=True, data_ptr=int)
    captures = iter([True, True, False])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: next(captures))
    for _ in range(2):
        assert _dispatch._implementation(param).endswith("make a step before the capture")
    with pytest.warns(match="cannot use its fused kernel for torch.float32 on cuda:0: .* foreach implementation"):
        refused = _dispatch._implementation(param)
    assert refused == _dispatch._implementation(param) == "its kernel failed: RuntimeError('wrong')"
