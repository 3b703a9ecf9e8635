"""The keys of the configuration that need a package beyond the required ones."""

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
    """Refuses a configuration that needs a package that is not installed.

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
    """Whether a package can be imported; a mere folder of that name, which has no origin, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
