"""Wrong versions of a module, made from its source: what tests must not let pass."""

from __future__ import annotations

import inspect

from lightning_rprop.optim import dispatch, foreach, update

_FUNCTION = {update: "update", foreach: "update_foreach"}


def mutated(module, *edits):
    """The names of the module, after each ``(old, new)`` edit of its source."""
    source = inspect.getsource(module)
    for old, new in edits:
        assert old in source, f"the mutation no longer fits the source: {old!r}"
        source = source.replace(old, new)
    namespace = {"__name__": module.__name__}
    exec(compile(source, "<mutant>", "exec"), namespace)
    return namespace


def put_mutant_in(monkeypatch, module, *edits):
    """Let the optimizer use a wrong ``update.py`` or ``foreach.py``."""
    name = _FUNCTION[module]
    monkeypatch.setattr(dispatch, name, mutated(module, *edits)[name])
