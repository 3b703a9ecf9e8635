"""Loads agents and targets: the lab's, a folder, or a hub id. Weights come from safetensors only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from appo.lm.model import CausalLM, out_of_memory
from appo.policy import Policy
from experiments.config import LAB, LAB_DIR, RunConfig
from experiments.run.files import writing
from rewards.connection import Connection
from rewards.served import address_of, find_server
from rewards.servers import Server

OWN_CODE = (
    "it comes with code of its own, which runs if the command line has trust_remote_code=true or --trust-remote-code"
)
NO_NUMBERS = "its logits are not numbers; the weights are damaged, or too large for their dtype"
TRIAL = "Input : a Output : b"
KEY = "APPO_TARGET_KEY"  # environment variable with the key of the target's server


class ModelError(ValueError):
    """A model cannot be loaded; the message says which, from where, and why."""


def load_model(config: RunConfig, role: Literal["agent", "target"]) -> CausalLM:
    """The model that `config.agent` or `config.target` names, on its device, after a trial on a few tokens.

    The agent's weights are float32, whatever dtype it computes in; the target's have its compute dtype, and are frozen.

    Raises:
        ModelError: no such folder or hub id, a folder without config or safetensors weights, no such device, a model
            that cannot be loaded, does not run, or has no end token or chat template where one is needed.
    """
    device = find_device(config.device)
    computes_in = compute_dtype(config.dtype if role == "agent" else config.target_dtype, device, role)
    stored_in = torch.float32 if role == "agent" else computes_in
    name = getattr(config, role)
    source = str(LAB_DIR / role) if name == LAB else name
    if Path(source).is_dir():
        _check_folder(role, Path(source))
    elif Path(source).exists():
        raise ModelError(f"{role}: {source!r} is a file; expected the folder of a causal LM")
    elif Path(source).is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ModelError(f"{role}: no folder {source!r}{_nearest(Path(source))}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options = {"trust_remote_code": config.trust_remote_code}
    with _explaining(f"{role}: cannot load {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=stored_in, use_safetensors=True, output_loading_info=True, **options
        )
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise ModelError(f"{role}: cannot load {name!r}: the weights lack {names}")
    model = model.to(device).eval()
    _check_runs(role, name, model, tokenizer)
    chat = config.agent_chat if role == "agent" else config.target_chat
    _check_tokenizer(role, name, tokenizer, chat)
    if role == "target":
        return CausalLM(model.requires_grad_(False), tokenizer, chat, onednn=config.onednn)
    return CausalLM(model, tokenizer, chat, computes_in, config.gradient_checkpointing, config.onednn)


def reach_server(config: RunConfig) -> Server:
    """The server that `config.target` names, after a trial. Its key comes from the environment and goes nowhere else.

    Raises:
        ServerError: no such address, nothing there, or not what a target needs.
    """
    url, model = address_of(config.target)
    return find_server(Connection(url, os.environ.get(KEY, "")), model, config.target_chat)


def save_agent(policy: Policy, folder: Path) -> None:
    """Writes the agent as a plain model folder for `AutoModelForCausalLM`; only checkpoints hold its value head.

    Raises:
        OSError: it cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)  # raises if a file is there; transformers would skip saving
        policy.model.save_pretrained(folder)
        policy.lm.tokenizer.save_pretrained(folder)


@contextmanager
def _explaining(what: str) -> Iterator[None]:
    """Turns any error that a model's files cause in transformers into a ModelError, except running out of memory."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        text = " ".join(str(error).split())
        text = OWN_CODE if "trust_remote_code" in text else text[:300]
        plain = text and isinstance(error, (OSError, ValueError, RuntimeError))
        raise ModelError(
            f"{what}: {text if plain else ': '.join(filter(None, (type(error).__name__, text)))}"
        ) from error


@torch.inference_mode()
def _check_runs(role: str, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Runs a few tokens: a model that loads may still have sizes that do not match, or weights that are not numbers."""
    with _explaining(f"{role}: {name!r} does not run"):
        ids = list(tokenizer(TRIAL)["input_ids"])
        rows = model.get_input_embeddings().weight.shape[0]
        if not ids or max(ids) >= rows:
            raise ValueError(f"its tokenizer makes {ids[:8]} of {TRIAL!r}, and the model knows {rows} tokens")
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits
        if logits.isnan().any() or logits.isposinf().any():  # -inf is sound: a token may be forbidden
            raise ValueError(NO_NUMBERS)


def _check_tokenizer(role: str, name: str, tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> None:
    if role == "agent" and tokenizer.eos_token_id is None:
        raise ModelError(f"agent: the tokenizer of {name!r} has no end-of-sequence token: no prompt would end")
    if chat and tokenizer.chat_template is None:
        raise ModelError(f"{role}: {role}_chat is true, but the tokenizer of {name!r} has no chat template")
    if chat or (chat is None and tokenizer.chat_template is not None):
        turns = [{"role": "user", "content": TRIAL}, {"role": "assistant", "content": TRIAL}]
        with _explaining(f"{role}: the chat template of {name!r} cannot be filled"):
            if role == "agent":
                tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
            else:
                tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)


def _check_folder(role: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{role}: {str(folder)!r} holds no config.json; expected the folder of a causal LM")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{role}: {str(folder)!r} holds no weights; expected *.safetensors")


def _nearest(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""


def compute_dtype(name: str, device: torch.device, role: Literal["agent", "target"]) -> torch.dtype:
    """The type that "float32", "bfloat16" or "auto" stands for on a device.

    On a CPU, auto leaves the agent in float32: in bfloat16 PPO's ratios would start near 1, not at 1.
    """
    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if role == "target" and device.type == "cpu" and native else torch.float32


def find_device(name: str) -> torch.device:
    """The device of that name; auto: the GPU if there is one, else the CPU.

    Raises:
        ModelError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        one = torch.ones(1, device=name)
        one.item()  # fails on the device "meta", whose tensors hold no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ModelError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return one.device
