"""Uploads the agent that a run saved to the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.config import RunConfig
from experiments.hub.card import HUB_ID, model_card
from experiments.run.files import write_whole
from experiments.run.folder import ADAPTER, RunFolderError

CARD = "README.md"


class PushError(ValueError):
    """The hub cannot be reached, or refuses the upload."""


def check_name(repo: str) -> None:
    """Refuses a name that no model on the hub can have.

    Raises:
        PushError: `repo` is not of the form OWNER/NAME.
    """
    if not HUB_ID.fullmatch(repo):
        raise PushError(f"the name on the hub is {repo!r}; expected OWNER/NAME, of letters, digits, '-', '_' and '.'")


def write_card(config: RunConfig, result: Mapping[str, Any], agent: Path, repo: str) -> bool:
    """Writes a model card into the folder of a run's agent, unless there is one; returns whether it wrote one.

    Args:
        config: the run's configuration.
        result: the content of best_prompt.json.
        agent: the folder of the agent's weights, in the run's folder.
        repo: the agent's name on the hub, OWNER/NAME.

    Raises:
        RunFolderError: there is no such folder.
    """
    if not agent.is_dir():
        raise RunFolderError(
            f"{str(agent.parent)!r} holds no folder {agent.name!r}; expected the folder of a finished run"
        )
    if (agent / CARD).is_file():
        return False
    chat = _has_chat_template(agent) if config.agent_chat is None else config.agent_chat
    write_whole(agent / CARD, model_card(config, result, repo, chat, (agent / ADAPTER).is_file()))
    return True


def _has_chat_template(agent: Path) -> bool:
    """Whether the agent's tokenizer has a chat template, in a separate file or in the tokenizer's configuration."""
    if (agent / "chat_template.jinja").is_file():
        return True
    try:
        return "chat_template" in json.loads((agent / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def upload(agent: Path, repo: str, private: bool = False) -> str:
    """Uploads a folder as a model, and creates the model if it does not exist; returns its address.

    Raises:
        PushError: there is no token, no network, or no right to write there.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise PushError("there is no token for the hub; run `hf auth login`, or set HF_TOKEN")
    hub = HfApi()
    try:
        address = hub.create_repo(repo, private=private or None, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=agent, commit_message="Upload an agent of StablePrompt")
    except Exception as error:  # whatever the client and its network library raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise PushError(f"cannot upload to {repo}: {reason}") from error
    return str(address)
