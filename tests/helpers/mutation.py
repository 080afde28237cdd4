"""Build wrong versions of a module from its source, to prove that tests fail with them."""

from __future__ import annotations

import importlib.util
import inspect
import tempfile
from functools import cache
from pathlib import Path

from cases import INTERPRETED, PATHS

from lightning_rprop.optim import _dispatch, _foreach, _machine_code, _numba, _rule
from lightning_rprop.optim._threads import PROTOTYPE

if INTERPRETED:
    from lightning_rprop.optim import _triton as fused_kernel
else:
    from lightning_rprop.optim import _numba_kernel as fused_kernel

# The modules that implement the rule, with the value of foreach that selects each.
IMPLEMENTATIONS = dict(zip((_rule, _foreach, fused_kernel), PATHS.values(), strict=True))

_FOLDER = tempfile.TemporaryDirectory()


def mutate(module, *edits):
    """Return a copy of the module with each ``(old, new)`` replacement made in its source."""
    source = inspect.getsource(module)
    for old, new in edits:
        assert old in source, f"the mutation no longer fits the source: {old!r}"
        source = source.replace(old, new)
    # keep one file per mutant, because Triton reads the source of a kernel when it is called
    name = f"mutant_{len(list(Path(_FOLDER.name).iterdir()))}"
    file = Path(_FOLDER.name, f"{name}.py")
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant


def use_mutant(monkeypatch, module, *edits):
    """Make the optimizer use a mutant of the implementation in ``module``."""
    mutant = mutate(module, *edits)
    if module is _rule:
        monkeypatch.setattr(_dispatch, "update", mutant.update)
    elif module is _foreach:
        monkeypatch.setattr(_dispatch, "update_foreach", mutant.update_foreach)
    elif not INTERPRETED:

        @cache
        def load_kernel(dtype):
            name = str(dtype).removeprefix("torch.")
            source = inspect.getsource(module) + str(edits) + name
            address = _machine_code.load("mutant", source, lambda: mutant.compile_kernel(name), check=lambda _: None)
            return PROTOTYPE(address)

        monkeypatch.setattr(_numba, "load_kernel", load_kernel)
    else:
        monkeypatch.setattr(module, "update_triton", mutant.update_triton)
        monkeypatch.setattr(_dispatch, "check", lambda *_: None)
        monkeypatch.setattr(_dispatch, "_loaded", {})
