"""Loads agents and targets: the lab's, a folder, or a hub id. Weights come from safetensors only."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from appo.policy import Policy
from experiments.config import LAB, RunConfig

VALUE_HEAD = "value_head.safetensors"
LAB_DIR = Path(__file__).parent / "lab"


class ModelError(ValueError):
    """A model cannot be loaded; the message says which, from where, and why."""


class LoadedModel(NamedTuple):
    """A causal LM and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_model(config: RunConfig, role: Literal["agent", "target"]) -> LoadedModel:
    """The model that `config.agent` or `config.target` names, on its device, in eval mode.

    The agent's weights are float32 whatever it computes in (`compute_dtype`); the target's are what it computes in.

    Raises:
        ModelError: no such folder or hub id, a folder without config or safetensors weights, no such device.
    """
    device = find_device(config.device)
    dtype = torch.float32 if role == "agent" else compute_dtype(config.target_dtype, device)
    name = getattr(config, role)
    source = str(LAB_DIR / role) if name == LAB else name
    if Path(source).is_dir():
        _check_folder(role, Path(source))
    elif Path(source).is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ModelError(f"{role}: no folder {source!r}{_nearest(Path(source))}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options = {"trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{role}: cannot load {name!r}: {reason}") from error
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise ModelError(f"{role}: cannot load {name!r}: the weights lack {names}")
    return LoadedModel(model.to(device).eval(), tokenizer)


def save_agent(policy: Policy, folder: Path) -> None:
    """The agent as a plain model folder, that `AutoModelForCausalLM` loads, and its value head in a file beside."""
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    save_file(policy.value_head.state_dict(), folder / VALUE_HEAD)


def _check_folder(role: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{role}: {str(folder)!r} holds no config.json; expected the folder of a causal LM")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{role}: {str(folder)!r} holds no weights; expected *.safetensors")


def _nearest(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""


def compute_dtype(name: str, device: torch.device, role: Literal["agent", "target"] = "target") -> torch.dtype:
    """The type that "float32", "bfloat16" or "auto" stands for on a device.

    On a CPU, auto leaves the agent in float32: in bfloat16 the ratios of PPO would start near 1 only.
    """
    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if role == "target" and device.type == "cpu" and native else torch.float32


def find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
