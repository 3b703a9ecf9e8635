"""Writes the model card of a run's agent from the run's files: a README.md with metadata for the hub.

The card is public. So it quotes no example, except in a few-shot prompt; of a path it shows only the last part, and of
a server's address only the name of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from experiments.config import INCIDENTAL, LABS, TRAINED, RunConfig, is_served, to_dict
from tasks.catalogue import is_spec_file
from tasks.meta_prompt import meta_prompt, rewrite_prompt
from tasks.spec import Example

TAGS = ("stableprompt", "appo", "prompt-tuning", "reinforcement-learning")
CHOSEN = {  # kind of a run's result -> how the card introduces it
    "manual": "The manual prompt; no other prompt scored higher on validation",
    "tuned": "The best prompt that it found, chosen on validation",
    "empty": "The empty prompt",
    "step-by-step": "The manual prompt with a request to think step by step",
    "few-shot": "The best prompt on validation: the manual prompt followed by training examples",
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
PATHS = ("task", "agent", "target", "data")  # keys that may name a file or folder
OF_THE_MACHINE = (*INCIDENTAL, "device", "threads")  # keys that concern this machine only


def model_card(config: RunConfig, result: Mapping[str, Any], repo: str, chat: bool, adapter: bool = False) -> str:
    """Returns the card of a finished run's agent.

    Args:
        config: the run's configuration.
        result: the content of best_prompt.json.
        repo: the agent's name on the hub, OWNER/NAME.
        chat: whether the agent was asked through its chat template.
        adapter: whether the upload holds only an adapter, without its base model.
    """
    parts = [
        f"---\n{yaml.safe_dump(_metadata(config, adapter), sort_keys=False)}---",
        f"# {repo.partition('/')[2]}",
        _what(config, result),
        "## Scores",
        _scores(result),
        "## Use",
        _use(config, result["manual_prompt"] if config.edit_manual else "", repo, chat),
        "## Configuration",
        "What differs from the defaults of StablePrompt/APPO:",
        _fenced("yaml", _differences(config)),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(config: RunConfig, adapter: bool) -> dict[str, Any]:
    """Returns the metadata for the hub. The owner has to add the licence, which depends on the base model's."""
    library = "peft" if adapter else "transformers"
    found: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": [*TAGS]}
    if config.agent not in LABS and _on_hub(config.agent):
        found["base_model"] = config.agent
    if not is_spec_file(config.task):  # the catalogue's tasks are in English
        found["language"] = "en"
    return found


def _what(config: RunConfig, result: Mapping[str, Any]) -> str:
    each = "an instruction for each input" if config.mode == "tte" else "instructions"
    how = "APPO" if config.appo.reference == "anchor" else f"PPO (reference: {config.appo.reference})"
    how = {"reinforce": "REINFORCE", "grpo": "GRPO"}.get(config.arm, how)
    trained = "not trained" if config.arm not in TRAINED else f"trained by {how} with StablePrompt (arXiv 2410.07652)"
    lines = [
        f"A language model that writes {each} for the task **{result['task']}**. It started as {_model(config.agent)} "
        f"and was {trained}; the reward was how well {_model(config.target)} answers under what it writes.",
    ]
    if result["prompt"] is not None:
        lines += [f"{CHOSEN.get(result['chosen'], 'The prompt')}:", _fenced("text", result["prompt"])]
    lines += ["It is filled, with an input, into the target's template:", _fenced("text", result["template"])]
    return "\n\n".join(lines)


def _scores(result: Mapping[str, Any]) -> str:
    best = "a prompt for each input" if result["prompt"] is None else "this prompt"
    splits = [f"{split} (n = {result[f'{split}_rows']})" for split in ("validation", "test")]
    table = [f"| {result['metric']} | {splits[0]} | {splits[1]} |", "|---|---|---|"]
    for name, which in ((best, ""), ("manual prompt", "manual_")):
        cells = (_score(result, f"{which}{split}") for split in ("validation", "test"))
        table.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*table, "", f"On test: {result['verdict']}. Intervals are 95 %. Seed {result['seed']}."])


def _score(result: Mapping[str, Any], name: str) -> str:
    numbers = (result[f"{name}_score"], *result[f"{name}_interval"])
    score, low, high = ("none" if number is None else f"{number:.3f}" for number in numbers)
    return f"{score} ({low} to {high})"


def _use(config: RunConfig, instruction: str, repo: str, chat: bool) -> str:
    """Returns Python code that lets the agent write, with its meta-prompt around the reader's own pairs."""
    pairs = [Example("FIRST INPUT", None, "ITS OUTPUT"), Example("SECOND INPUT", None, "ITS OUTPUT")]
    asked = rewrite_prompt(pairs, "THE INPUT", instruction) if config.mode == "tte" else meta_prompt(pairs)
    text = 'f"{request}\\n{opening}"'
    if chat:
        text = '[{"role": "user", "content": request}, {"role": "assistant", "content": opening}]'
    # A line break ends a prompt once something is written.
    ends = 'written[0]["generated_text"].strip()' + ('.split("\\n")[0]' if config.sampling.one_line else "")
    length, temperature = config.sampling.max_new_tokens, config.sampling.temperature
    # In training nothing is cut from the distribution; generate() cuts it to 50 tokens unless told otherwise.
    sampling = f"max_new_tokens={length}, temperature={temperature}, top_k=0, top_p=1.0"
    code = f"""from transformers import pipeline

request = {asked.request!r}
opening = {asked.opening!r}
write = pipeline("text-generation", {repo!r})
text = {text}
written = write(text, do_sample=True, {sampling}, return_full_text=False)
print({ends})"""
    note = f"It was trained on requests with {config.examples.pairs} pairs; use as many."
    return f"{_fenced('python', code)}\n\n{note}"


def _differences(config: RunConfig) -> str:
    """Returns the keys that differ from the defaults, without those that only concern this machine."""
    default = to_dict(RunConfig())
    found: dict[str, Any] = {}
    for key, value in to_dict(config).items():
        if key in OF_THE_MACHINE or value == default[key]:
            continue
        if isinstance(value, dict):
            found[key] = {name: item for name, item in value.items() if item != default[key][name]}
        else:
            found[key] = _public(value) if key in PATHS else value
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True).strip() if found else "# nothing"


def _model(name: str) -> str:
    if name in LABS:
        return "the tiny model of APPO's lab"
    return f"[{name}](https://huggingface.co/{name})" if _on_hub(name) else f"`{_public(name)}`"


def _on_hub(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def _public(name: str) -> str:
    """Returns a name without what is private: the last part of a path, or the model's name from a server's address."""
    if is_served(name):
        return name.partition("#")[2] or "a model behind a server"
    return name if _on_hub(name) else Path(name).name


def _fenced(language: str, text: str) -> str:
    """Returns a block of code, with a longer fence than any in the text, which a model may have written."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
