"""Keys of the configuration that need an optional package."""

from __future__ import annotations

from importlib.util import find_spec

from experiments.config import RunConfig, flat, to_dict
from experiments.config.strict import ConfigError

EXTRAS = {  # key -> (package, the extra that installs it)
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "lora.rank": ("peft", "lora"),
    "target_quantization": ("bitsandbytes", "bitsandbytes"),
}


def check_extras(config: RunConfig) -> None:
    """Refuses a configuration if the package that one of its keys needs is not installed.

    Raises:
        ConfigError: such a key is set.
    """
    keys = flat(to_dict(config))
    for key, (package, extra) in EXTRAS.items():
        if keys[key] and not installed(package):
            raise ConfigError(
                f"{key} is set, but the package {package} is not installed; pip install 'stableprompt-appo[{extra}]'"
            )


def installed(package: str) -> bool:
    """Whether a package can be imported. A plain folder of that name has no origin and is no package."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
