"""Loads agents and targets: the lab's, a folder, or a hub id. Weights come from safetensors only.

An agent may be an adapter (LoRA) on a frozen base: a new one, or the folder of one that a run has saved.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from appo.lm import adapter
from appo.lm.model import CausalLM, out_of_memory
from appo.policy import Policy
from experiments.config import LABS, MODELS, RunConfig, is_served, lab_folder
from experiments.config.extras import installed
from experiments.run.files import writing
from experiments.run.folder import ADAPTER
from rewards.connection import Connection
from rewards.served import ServerError, address_of, find_server
from rewards.servers import Server

OWN_CODE = (
    "it comes with code of its own, which runs if the command line has trust_remote_code=true or --trust-remote-code"
)
NO_NUMBERS = "its logits are not numbers; the weights are damaged, or too large for their dtype"
TRIAL = "Input : a Output : b"
Role = Literal["agent", "target"]
KEY = "APPO_TARGET_KEY"  # environment variable with the key of the target's server


class ModelError(ValueError):
    """A model cannot be loaded; the message says which, from where, and why."""


def load_models(config: RunConfig) -> tuple[CausalLM, CausalLM]:
    """Agent and target. An adapter on the target's own checkpoint shares its weights: they are loaded once.

    Raises:
        ModelError: as for `load_model`.
    """
    agent = load_model(config, "agent")
    if not shares_base(config, agent.model.dtype):
        return agent, load_model(config, "target")
    _check_tokenizer("target", config.target, agent.tokenizer, config.target_chat)
    return agent, agent.without_adapter(config.target_chat)


def shares_base(config: RunConfig, held_in: torch.dtype) -> bool:
    """Whether the target is what the agent's adapter is added to, in the same dtype; then one copy does for both.

    Args:
        config: of the run.
        held_in: dtype of the agent's frozen weights.
    """
    if rank_of(config) is None or config.target_quantization:
        return False
    asked = held_in if config.target_dtype == "auto" else getattr(torch, config.target_dtype)
    return asked == held_in and same_source(base_of(config), source_of(config, "target"))


def same_source(one: str, other: str) -> bool:
    """Whether two names, of folders or at a hub, are the same checkpoint."""
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def load_model(config: RunConfig, role: Role) -> CausalLM:
    """The model that `config.agent` or `config.target` names, on its device, after a trial on a few tokens.

    What is trained is float32, whatever dtype the agent computes in: all its weights, or its adapter. Frozen weights
    have the dtype that they are used in.

    Raises:
        ModelError: no such folder or hub id, a folder without config or safetensors weights, no such device, a model
            that cannot be loaded, does not run, or has no end token or chat template where one is needed.
    """
    device = find_device(config.device)
    check_source(config, role)
    computes_in = compute_dtype(config.dtype if role == "agent" else config.target_dtype, device, role)
    name, source = getattr(config, role), source_of(config, role)
    adapted = role == "agent" and rank_of(config) is not None
    stored_in = torch.float32 if role == "agent" and not adapted else computes_in
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    with _explaining(f"{role}: cannot load {name!r}"), _no_advice():
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=stored_in,
            use_safetensors=True,
            output_loading_info=True,
            **options,
            **(_quantized(config, stored_in, device) if role == "target" else {}),
        )
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise ModelError(f"{role}: cannot load {name!r}: the weights lack {names}")
    model = model.eval() if getattr(model, "is_quantized", False) else model.to(device).eval()
    _check_runs(role, name, model, tokenizer)
    chat = config.agent_chat if role == "agent" else config.target_chat
    _check_tokenizer(role, name, tokenizer, chat)
    if adapted:
        _adapt(config, model)
    with _explaining(f"{role}: {name!r} does not run"):
        if role == "target":
            return CausalLM(model.requires_grad_(False), tokenizer, chat, onednn=config.onednn)
        return CausalLM(model, tokenizer, chat, computes_in, config.gradient_checkpointing, config.onednn)


def check_source(config: RunConfig, role: Role) -> None:
    """Refuses a name that is visibly no model, without loading anything or asking a hub; accepts any server.

    Raises:
        ModelError: a file, a folder without config or weights, or a name that only a folder can have, and none has.
    """
    source = source_of(config, role)
    if role == "target" and is_served(source):
        return
    if Path(source).is_dir():
        _check_folder(role, Path(source))
    elif Path(source).exists():
        raise ModelError(f"{role}: {source!r} is a file; expected the folder of a causal LM")
    elif is_missing_folder(source):
        raise ModelError(f"{role}: {no_folder(source)}")


def is_missing_folder(source: str) -> bool:
    """Whether nothing has this name and no hub can: it is a path, or begins with `models` or a folder that is there."""
    path = Path(source)
    if path.exists():
        return False
    within = len(path.parts) > 1 and (path.parts[0] == MODELS or Path(path.parts[0]).is_dir())
    return within or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1


def no_folder(source: str) -> str:
    """The message that a model's folder is missing, with the nearest name or the command that makes it."""
    path = Path(source)
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=1)
    hints = [f"did you mean {str(path.parent / near[0])!r}?"] if near else []
    hints += ["`make weights` puts models there"] if path.parts[:1] == (MODELS,) else []
    return "; ".join([f"no folder {source!r}", *([" ".join(hints)] if hints else [])])


def source_of(config: RunConfig, role: Role) -> str:
    """Where a model comes from: a folder or hub id."""
    name: str = getattr(config, role)
    return str(lab_folder(name, role)) if name in LABS else name


def base_of(config: RunConfig) -> str:
    """Where the agent's weights come from; for the folder of an adapter, the source of its base model."""
    source = source_of(config, "agent")
    return _base(source) or source


def rank_of(config: RunConfig) -> int | None:
    """The rank of the agent's adapter, a new one or that in its folder; None: the agent has none."""
    rank: int | None = _adapter(source_of(config, "agent")).get("r", config.lora.rank)
    return rank


def targets_of(config: RunConfig) -> str | tuple[str, ...]:
    """The layers of the agent's adapter, as `appo.lm.adapter` takes them; of one in a folder, those that it has."""
    names = _adapter(source_of(config, "agent")).get("target_modules", config.lora.layers)
    return adapter.ALL_LINEAR if names == [adapter.ALL_LINEAR] else names if isinstance(names, str) else tuple(names)


def _base(source: str) -> str | None:
    """The base model of the adapter in a folder; None if the folder holds no adapter."""
    return _adapter(source).get("base_model_name_or_path")


def _adapter(source: str) -> dict[str, Any]:
    """What peft wrote about the adapter in a folder; nothing if the folder holds no adapter."""
    try:
        found = json.loads((Path(source) / ADAPTER).read_text(encoding="utf-8"))
        return found if isinstance(found["base_model_name_or_path"], str) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _quantized(config: RunConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """How transformers is asked for a target with weights of 8 or 4 bits; it puts such a model on its device itself."""
    if config.target_quantization is None:
        return {}
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a cast in each layer of each pass
    eight = config.target_quantization == "int8"
    kind = BitsAndBytesConfig(load_in_8bit=eight, load_in_4bit=not eight, bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": kind, "device_map": {"": str(device)}}


def _adapt(config: RunConfig, model: PreTrainedModel) -> None:
    """Gives the agent a new adapter, or makes the one that it came with trainable."""
    rank, alpha = config.lora.rank, config.lora.alpha
    if rank is None or adapter.is_in(model):
        adapter.make_trainable(model)
        return
    with _explaining(f"agent: no adapter fits {config.agent!r} with lora.targets={config.lora.targets}"):
        adapter.add(model, rank, alpha, targets_of(config))


def reach_server(config: RunConfig) -> Server:
    """The server that `config.target` names, after a trial. Its key comes from the environment and goes nowhere else.

    Raises:
        ServerError: no such address, no key that a request can carry, nothing there, or not what a target needs.
    """
    url, model = address_of(config.target)
    key = os.environ.get(KEY, "").strip()  # as read from a file, with its line break
    if not (key.isascii() and key.isprintable()):
        raise ServerError(f"{KEY} holds characters that no key can have; expected printable ASCII")
    return find_server(Connection(url, key), model, config.target_chat)


def save_agent(policy: Policy, folder: Path) -> None:
    """Writes the agent as a folder for `AutoModelForCausalLM`: the model, or its adapter alone; no value head.

    All processes call it, and the first one writes.

    Raises:
        OSError: it cannot be written.
    """
    model = policy.model
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    weights = policy.ranks.whole({name: w for name, w in model.state_dict().items() if name not in tied})
    if policy.ranks.rank > 0:
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)  # raises if a file is there; transformers would skip saving
        model.save_pretrained(folder, state_dict=weights)
        policy.lm.tokenizer.save_pretrained(folder)


def save_merged(agent: Path, folder: Path) -> None:
    """Writes a saved adapter and its base as one plain model, in the dtype of the base.

    Raises:
        ModelError: the folder holds no adapter, or its base cannot be loaded.
        OSError: it cannot be written.
    """
    base = _base(str(agent))
    if base is None:
        raise ModelError(f"{str(agent)!r} holds no adapter; the agent was trained as a whole, and is a plain model")
    _check_folder("agent", agent)
    with _explaining(f"agent: cannot load {str(agent)!r}"), _no_advice():
        from peft import PeftModel

        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True)
        model = PeftModel.from_pretrained(model, agent).merge_and_unload()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(agent).save_pretrained(folder)


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


def _no_advice() -> AbstractContextManager[Any]:
    """Hides what one library's developers say to another's: peft uses names that transformers is about to drop."""
    return warnings.catch_warnings(action="ignore", category=FutureWarning)


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
    if base := _base(str(folder)):
        if not installed("peft"):
            raise ModelError(
                f"{role}: {str(folder)!r} holds an adapter, which needs the package peft; "
                "pip install 'stableprompt-appo[lora]'"
            )
        if is_missing_folder(base):
            raise ModelError(f"{role}: {str(folder)!r} holds an adapter to {base!r}, which is not there any more")
    elif not (folder / "config.json").is_file():
        raise ModelError(f"{role}: {str(folder)!r} holds no config.json; expected the folder of a causal LM")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{role}: {str(folder)!r} holds no weights; expected *.safetensors")


def compute_dtype(name: str, device: torch.device, role: Role) -> torch.dtype:
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


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has used so far, in bytes: of the GPU, if the models are on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB
