"""Makes configs such as ``optimizer=rprop`` available to every Hydra app once the package is installed.

Hydra imports this module whenever any app on the machine starts, and an exception here would break them all. The module
therefore stays simple and imports no torch. Hydra may execute it twice, so it defines no dataclass for configs.

The configs come from a config source rather than from Hydra's ConfigStore. Store entries would overwrite an app's own
entries of the same name, and Hydra 1.3 fails when it merges an app's ``optimizer/rprop.yaml`` into a store entry.

An optimizer config replaces the section that it is composed into. If it were merged into another optimizer's section
(``+optimizer@model.optimizer=rprop``), that optimizer's arguments would remain, and Rprop rejects Adam's ``betas``.
Each entry of the group ``optimizer`` therefore composes two configs: an interpolation, which replaces the section, and
the typed config, which OmegaConf puts in place of an interpolation instead of merging the two.
"""

from __future__ import annotations

import os
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from lightning_rprop._hydra_ddp import RANK_FILE
from lightning_rprop.config import CONFIGS

_SCHEME = "lightning-rprop"
_EMPTY, _TYPED = "lightning_rprop/empty", "lightning_rprop/"  # paths that no group lists

if RANK_FILE in os.environ:
    from lightning_rprop._hydra_ddp.rank import join_job

    join_job()


class LightningRpropSearchPath(SearchPathPlugin):
    """Appends the config source to the search path, after the app's own files, which take precedence."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the config source."""
        search_path.append(provider="lightning_rprop", path=f"{_SCHEME}://")


class LightningRpropConfigSource(ConfigSource):
    """Serves ``CONFIGS``, without the entries that the app has in its ConfigStore, which Hydra searches last."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme of this source."""
        return _SCHEME

    def available(self) -> bool:
        """Return whether the source can be read, which it always can."""
        return True

    def load_config(self, config_path: str) -> ConfigResult:
        """Build the config, typed by its dataclass."""
        if not self.is_config(config_path):
            raise ConfigLoadError(f"Config not found : {config_path}")
        name = _name(config_path)
        if name == _EMPTY:
            config: DictConfig = _Interpolation("${lightning_rprop.replaces.this.section}")
        elif name.startswith("optimizer/"):
            config = OmegaConf.create({"defaults": [f"/{_EMPTY}@_here_", f"/{_TYPED}{name}@_here_"]})
        else:
            config = OmegaConf.create(CONFIGS[name.removeprefix(_TYPED)])
        return ConfigResult(self.provider, self.full_path(), config, header={"package": None})

    def is_group(self, config_path: str) -> bool:
        """Return whether there is a config below this path."""
        return any(name.startswith(_folder(config_path)) for name in CONFIGS)

    def is_config(self, config_path: str) -> bool:
        """Return whether the path names a config of this source that the app has not in its own ConfigStore."""
        name = _name(config_path)
        if name.startswith(_TYPED):
            return name == _EMPTY or name.removeprefix(_TYPED) in CONFIGS
        return name in CONFIGS and ConfigStore.instance().get_type(f"{name}.yaml") != ObjectType.CONFIG

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List the groups and configs directly below this path, or only one kind."""
        folder = _folder(config_path)
        children = {name.removeprefix(folder).split("/")[0] for name in CONFIGS if name.startswith(folder)}
        kinds = {ObjectType.GROUP: self.is_group, ObjectType.CONFIG: self.is_config}
        wanted = kinds.values() if results_filter is None else [kinds[results_filter]]
        return sorted(child for child in children for is_wanted in wanted if is_wanted(f"{folder}{child}"))


class _Interpolation(DictConfig):
    """An interpolation that Hydra can load as a config: Hydra pops the defaults list from every config."""

    def pop(self, key: Any, default: Any = None) -> Any:
        return default


def _name(config_path: str) -> str:
    return config_path.strip("/").removesuffix(".yaml")


def _folder(config_path: str) -> str:
    return f"{config_path.strip('/')}/".lstrip("/")
