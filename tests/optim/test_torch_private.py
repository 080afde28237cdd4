"""The private names of torch are in one file and work with the supported releases."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch._dynamo.variables import optimizer as dynamo_optimizer
from torch._subclasses import FakeTensorMode
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import _flat_param, fully_sharded_data_parallel
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Sampler, SequentialSampler

from lightning_rprop import _torch

ROOT = Path(__file__).parents[2]
PACKAGE = Path(_torch.__file__).parent
OLDEST, NEWEST = "2.8", "2.15"

# Files that call torch's foreach functions, with the reason.
FOREACH = {
    "best/weights.py": "copies all tensors in one call",
    "optim/_foreach.py": "the foreach implementation of the rules",
    "optim/rprop.py": "counts the steps of all parameters in one call",
    "full_batch/_evaluation.py": "scales all gradients in one call",
    "full_batch/_atomic_step.py": "copies all tensors in one call",
}
# Files that collect the private names of their package.
OTHERS = {"_torch.py", "_lightning.py", "_hydra.py"}


def minor(version):
    return tuple(map(int, version.split(".")[:2]))


def sources():
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def private_attributes(tree):
    """Return names like ``x._name``, where x is not self or cls."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and re.match(r"_[a-z]", node.attr)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }


def test_claimed_releases_are_those_checked():
    claimed = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert minor(claimed) == minor(OLDEST)
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
    for version in (pinned, torch.__version__):
        assert minor(OLDEST) <= minor(version) <= minor(NEWEST), "check _torch.py against this release"


def test_private_names_are_in_one_file():
    """Private attributes in other files do not exist in torch, or are foreach functions."""
    owners = (torch, torch.Tensor, torch._C, DataLoader, torch.optim.Optimizer, distributed_c10d, torch.nn.Module())
    found = {
        (file, name)
        for file, tree in sources().items()
        if file not in OTHERS
        for name in private_attributes(tree)
        if any(hasattr(owner, name) for owner in owners)
    }
    assert {file for file, _ in found} == FOREACH.keys()
    assert all(name.startswith("_foreach_") for _, name in found)


def test_foreach_functions_exist():
    names = {name for file, tree in sources().items() if file in FOREACH for name in private_attributes(tree)}
    names = {name for name in names if name.startswith("_foreach_")}
    assert len(names) >= 10
    assert all(callable(getattr(torch, name)) for name in names)


def test_private_strings_are_in_one_file():
    """They are attribute names for getattr()."""
    strings = {"_iterator", "_shutdown_workers", "_get_iterator", _torch.FSDP_MARK}
    files = {
        file
        for file, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in strings
    }
    assert files == {"_torch.py"}


def test_private_modules_are_not_imported():
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [f"{getattr(node, 'module', '')}.{alias.name}" for alias in node.names]
                if file in OTHERS and isinstance(node, ast.ImportFrom):  # which may import names, but not modules
                    names = [node.module]
                assert not [name for name in names if re.match(r"\.?torch\b.*\._", name)], file


# ---------------------------------------------------------------------------------------------- what each name does


def test_nested_structures_are_mapped():
    nested = ([1, {"a": None}], (2,))
    assert _torch.tree_leaves(nested) == [1, None, 2]
    assert _torch.tree_map(lambda x, y: (x, y), nested, nested) == ([(1, 1), {"a": (None, None)}], ((2, 2),))


def test_shared_contents_keep_modules_equal():
    net, other = torch.nn.BatchNorm1d(3), torch.nn.Module()
    for name in _torch.MODULE_CONTENTS:
        vars(other)[name] = vars(net)[name]
    net.double().register_buffer("new", torch.ones(1), persistent=False)
    net.add_module("child", torch.nn.Linear(1, 1))
    assert [*other.state_dict()] == [*net.state_dict()]
    assert other.get_parameter("child.weight") is net.child.weight
    assert [name for name, _ in _torch.tensor_dicts(net)] == ["", "", "child", "child"]
    assert [*_torch.tensor_dicts(net)[1][1]] == ["running_mean", "running_var", "num_batches_tracked", "new"]


def test_is_watched_inside_a_mode_only():
    assert not _torch.is_watched()
    with TorchDispatchMode():
        assert _torch.is_watched()
        assert not _torch.is_simulating()


def test_is_simulating_inside_modes_only():
    assert not _torch.is_simulating()
    with FakeTensorMode():
        assert _torch.is_simulating()
    seen = []
    make_fx(lambda x: seen.append(_torch.is_simulating()) or x + 1)(torch.ones(1))
    torch.func.functionalize(lambda x: seen.append(_torch.is_transformed()) or x + 1)(torch.ones(1))
    assert seen == [True, True]


def test_is_simulated_without_values():
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(1))
    seen = []
    make_fx(lambda x: seen.append(_torch.is_simulated(x)) or x + 1, tracing_mode="fake")(torch.ones(1))
    assert _torch.is_simulated(fake)
    assert _torch.is_simulated(torch.ones(1, device="meta"))
    assert not _torch.is_simulated(torch.ones(1))
    assert seen == [True]


def test_is_transformed_inside_vmap_only():
    seen = []
    torch.vmap(lambda x: seen.append(_torch.is_transformed()) or x)(torch.ones(2))
    assert seen == [True]
    assert not _torch.is_transformed()


@pytest.mark.parametrize("unknown", [True, False])
def test_is_true_falls_back_to_unknown(unknown):
    assert _torch.is_true(torch.tensor(True), unknown=unknown)
    assert not _torch.is_true(torch.tensor(False), unknown=unknown)
    assert _torch.is_true(torch.tensor(True, device="meta"), unknown=unknown) is unknown
    with FakeTensorMode():
        assert _torch.is_true(torch.rand(1).any(), unknown=unknown) is unknown


def test_version_counts_in_place_changes():
    tensor = torch.ones(2)
    before = _torch.version_of(tensor)
    tensor + 1
    assert _torch.version_of(tensor) == before
    tensor.add_(1)
    assert _torch.version_of(tensor) == before + 1
    with torch.inference_mode():
        assert _torch.version_of(torch.ones(2)) == 0


def test_buffer_dicts_replace_buffers():
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Identity())
    first, outer, last = (dict(buffers) for buffers in [*_torch.buffer_dicts(module)][:3])
    assert (first, last) == ({}, {})
    assert outer.keys() == {"running_mean", "running_var", "num_batches_tracked"}
    _torch.buffer_dicts(module)[1]["running_mean"] = torch.ones(2)
    assert torch.equal(module[0].running_mean, torch.ones(2))


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hooks_are_found(register):
    param = torch.nn.Parameter(torch.ones(1))
    assert not _torch.has_gradient_hooks(param)
    getattr(param, register)(lambda *_: None)
    assert _torch.has_gradient_hooks(param)


def test_spectral_norm_is_found():
    old = torch.nn.utils.spectral_norm(torch.nn.Linear(2, 2))
    new = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(2, 2))
    hooked = torch.nn.Linear(2, 2)
    hooked.register_forward_pre_hook(lambda *_: None)
    assert _torch.is_spectral_norm(old)
    assert sum(map(_torch.is_spectral_norm, new.modules())) == 1
    assert not _torch.is_spectral_norm(hooked)


def test_fsdp_marks_its_parameters():
    tensor = torch.nn.Parameter(torch.ones(1))
    _flat_param._set_fsdp_flattened(tensor)
    assert hasattr(tensor, _torch.FSDP_MARK)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_plain_name_has_no_wrapper_prefixes():
    compiled = torch.compile(torch.nn.Sequential(torch.nn.Linear(1, 1)))
    names = [name for name, _ in compiled.named_parameters()]
    assert [_torch.plain_name(name) for name in names] == ["0.weight", "0.bias"] != names
    assert _torch.plain_name(f"{fully_sharded_data_parallel.FSDP_WRAPPED_MODULE}.net.weight") == "net.weight"


class Changed(DataLoader):
    def __iter__(self):
        return iter([torch.ones(1)])


class AlsoChanged(DataLoader):
    def _get_iterator(self):
        return super()._get_iterator()


class Unchanged(DataLoader):
    def extra(self):
        return 1


@pytest.mark.parametrize(("cls", "own"), [(Changed, True), (AlsoChanged, True), (Unchanged, False)])
def test_own_iteration_is_recognized(cls, own):
    assert _torch.has_own_iteration(cls([1.0])) is own


def test_copy_with_sampler_keeps_the_rest():
    loader = Unchanged([1.0, 2.0, 3.0], batch_size=None, num_workers=0)
    loader.mine = 7

    class Backwards(Sampler):
        def __iter__(self):
            return iter([2, 1, 0])

    copied = _torch.copy_with_sampler(loader, "sampler", Backwards())
    assert [float(x) for x in copied] == [3.0, 2.0, 1.0]
    assert [float(x) for x in loader] == [1.0, 2.0, 3.0]
    assert (type(copied), copied.mine, type(loader.sampler)) == (Unchanged, 7, SequentialSampler)


def test_persistent_workers_shut_down():
    loader = DataLoader([1.0, 2.0], num_workers=1, persistent_workers=True)
    list(loader)
    (worker,) = loader._iterator._workers
    copied = _torch.copy_with_sampler(loader, "sampler", loader.sampler)
    assert copied._iterator is None  # its batches must not come from these workers
    assert worker.is_alive()
    _torch.shut_down_workers(loader)
    assert not worker.is_alive()
    assert loader._iterator is None
    _torch.shut_down_workers(loader)  # no workers to shut down
    assert len(list(loader)) == 2


def test_process_group_names_start_again(monkeypatch):
    monkeypatch.setattr(distributed_c10d._world, "group_count", 3)
    _torch.reset_process_group_count()
    assert distributed_c10d._world.group_count == 0
    assert "_world.group_count" in inspect.getsource(distributed_c10d._process_group_name)


def test_abort_process_group_aborts_the_default(tmp_path, monkeypatch):
    aborted = []
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda *args: aborted.append(args))
    _torch.abort_process_group()
    assert aborted == [()]
    monkeypatch.undo()
    assert inspect.signature(distributed_c10d._abort_process_group).parameters["group"].default is None


def test_compiler_calls_init_group():
    """torch.compile calls the method that Rprop overrides."""
    assert "_init_group" in inspect.getsource(dynamo_optimizer)
