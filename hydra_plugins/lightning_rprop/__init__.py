"""What makes ``optimizer=rprop`` known to every Hydra app once the package is installed.

Hydra imports this module at each start of each app on the machine, and an exception here would end them all: keep it
trivial, without torch. Hydra may also execute it twice: define no config dataclass here.

A config source rather than entries in Hydra's ConfigStore: the store's entries would overwrite an app's own ones of the
same name, and Hydra 1.3 merges an app's ``optimizer/rprop.yaml`` into a store entry of that name, which then fails.
"""

from __future__ import annotations

import os

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from lightning_rprop.config import CONFIGS
from lightning_rprop.hydra_job import RANK_FILE

_SCHEME = "lightning-rprop"

if RANK_FILE in os.environ:
    from lightning_rprop.hydra_job.rank import join_job

    join_job()


class LightningRpropSearchPath(SearchPathPlugin):
    """Append our configs to the search path: behind the app's own files, which therefore win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the source below."""
        search_path.append(provider="lightning_rprop", path=f"{_SCHEME}://")


class LightningRpropConfigSource(ConfigSource):
    """The entries of ``CONFIGS``, less those that the app has in its ConfigStore, which Hydra asks last."""

    @staticmethod
    def scheme() -> str:
        """Name the scheme of this source."""
        return _SCHEME

    def available(self) -> bool:
        """Tell that the source can be read."""
        return True

    def load_config(self, config_path: str) -> ConfigResult:
        """Make the config anew, typed by its dataclass."""
        if not self.is_config(config_path):
            raise ConfigLoadError(f"Config not found : {config_path}")
        config = OmegaConf.create(CONFIGS[_name(config_path)])
        return ConfigResult(self.provider, self.full_path(), config, header={"package": None})

    def is_group(self, config_path: str) -> bool:
        """Tell whether some config lies below this path."""
        return any(name.startswith(f"{config_path.strip('/')}/".lstrip("/")) for name in CONFIGS)

    def is_config(self, config_path: str) -> bool:
        """Tell whether this is one of our configs, and not one of the app's."""
        name = _name(config_path)
        return name in CONFIGS and ConfigStore.instance().get_type(f"{name}.yaml") != ObjectType.CONFIG

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List what lies directly below this path."""
        folder = f"{config_path.strip('/')}/".lstrip("/")
        found: list[str] = []
        for child in {name.removeprefix(folder).split("/")[0] for name in CONFIGS if name.startswith(folder)}:
            self._list_add_result(found, f"{folder}{child}", child, results_filter)
        return sorted(found)


def _name(config_path: str) -> str:
    return config_path.strip("/").removesuffix(".yaml")
