"""The configs of the example app."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.filterwarnings("ignore:The version_base parameter is deprecated")  # from Hydra 1.4 on
@pytest.mark.parametrize("group", ["data", "trainer"])
def test_every_option_but_default_is_complete(group):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        configs = {
            path.stem: compose("train", [f"{group}={path.stem}", "output_dir=out"])[group]
            for path in (CONF / group).glob("*.yaml")
        }
    missing = {option: OmegaConf.missing_keys(config) for option, config in configs.items()}
    assert {option for option, keys in missing.items() if keys} == {"default"}
    assert all(config._target_ == configs["default"]._target_ for config in configs.values())
