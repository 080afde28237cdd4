"""Makes ``optimizer=rprop`` known to every Hydra app once the package is installed.

Hydra imports this module whenever any app on the machine starts, and an exception here would end them all: keep it
trivial, without torch. Hydra may also execute it twice: define no config dataclass here.

The configs come from a config source and not from Hydra's ConfigStore. Store entries would overwrite an app's own
entries of the same name, and Hydra 1.3 merges an app's ``optimizer/rprop.yaml`` into a store entry of that name, which
fails.

An optimizer config replaces the section that it is composed into. Merged into another optimizer's section, as by
``+optimizer@model.optimizer=rprop``, it would keep that optimizer's arguments (Adam's ``betas``), which Rprop refuses.
So ``optimizer/rprop`` consists of two configs: an interpolation, and the typed config, which OmegaConf does not merge
into an interpolation but puts in its place.
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
    """Appends our configs to the search path, after the app's own files, which therefore win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the source below."""
        search_path.append(provider="lightning_rprop", path=f"{_SCHEME}://")


class LightningRpropConfigSource(ConfigSource):
    """The entries of ``CONFIGS``, except those that the app has in its ConfigStore, which Hydra asks last."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme of this source."""
        return _SCHEME

    def available(self) -> bool:
        """Return that the source can be read."""
        return True

    def load_config(self, config_path: str) -> ConfigResult:
        """Build the config, typed by its dataclass."""
        if not self.is_config(config_path):
            raise ConfigLoadError(f"Config not found : {config_path}")
        name = _name(config_path)
        if name == _EMPTY:
            config: DictConfig = _Empty("${lightning_rprop.replaces.this.section}")
        elif name.startswith("optimizer/"):
            config = OmegaConf.create({"defaults": [f"/{_EMPTY}@_here_", f"/{_TYPED}{name}@_here_"]})
        else:
            config = OmegaConf.create(CONFIGS[name.removeprefix(_TYPED)])
        return ConfigResult(self.provider, self.full_path(), config, header={"package": None})

    def is_group(self, config_path: str) -> bool:
        """Return whether some config lies below this path."""
        return any(name.startswith(f"{config_path.strip('/')}/".lstrip("/")) for name in CONFIGS)

    def is_config(self, config_path: str) -> bool:
        """Return whether this is one of our configs and not one of the app's."""
        name = _name(config_path)
        if name.startswith(_TYPED):
            return name == _EMPTY or name.removeprefix(_TYPED) in CONFIGS
        return name in CONFIGS and ConfigStore.instance().get_type(f"{name}.yaml") != ObjectType.CONFIG

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List the entries directly below this path."""
        folder = f"{config_path.strip('/')}/".lstrip("/")
        found: list[str] = []
        for child in {name.removeprefix(folder).split("/")[0] for name in CONFIGS if name.startswith(folder)}:
            self._list_add_result(found, f"{folder}{child}", child, results_filter)
        return sorted(found)


class _Empty(DictConfig):
    """An interpolation from which Hydra can take the defaults list, which it has not."""

    def pop(self, key: Any, default: Any = None) -> Any:
        return default


def _name(config_path: str) -> str:
    return config_path.strip("/").removesuffix(".yaml")
