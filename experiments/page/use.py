"""How to use a result: with transformers, with any server that speaks OpenAI's protocol, and with `appo prompt`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from experiments.config import LABS, RewardConfig, is_served, lab_folder

TRANSFORMERS = """from transformers import pipeline

template, prompt = {template!r}, {prompt!r}
target = pipeline("text-generation", model={target!r})
text = template.replace("{{input}}", "...").replace("{{prompt}}", prompt)  # a prompt may hold {{input}}
answer = target({asked}, max_new_tokens={tokens}, do_sample=False, return_full_text=False)[0]["generated_text"]
print({cut})
"""
OPENAI = """from openai import OpenAI

template, prompt = {template!r}, {prompt!r}
client = OpenAI(base_url={url!r}, api_key="none")
text = template.replace("{{input}}", "...").replace("{{prompt}}", prompt)  # a prompt may hold {{input}}
reply = client.{ask}, max_tokens={tokens}, temperature=0)
answer = reply.choices[0].{answer}
print({cut})
"""
WORD = 8  # tokens, enough for a label word
ONE_LINE = 'answer.strip().partition("\\n")[0].partition("Input :")[0].strip()'  # as the run cut its answers
TURN = '[{"role": "user", "content": text}]'


def snippets(result: Mapping[str, Any], folder: str, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(title, code) of each way to use the result; a prompt per input needs the agent, hence `appo prompt` alone.

    Args:
        result: what best_prompt.json holds.
        folder: of the run.
        config: of the run: whether the target was asked in its chat template, and how long text answers may be.
    """
    command = f'appo prompt --run {shlex.quote(folder)} --input "..." --answer'
    if result["prompt"] is None:
        return [("On the command line", command)]
    chat, text = config.get("target_chat") is True, result.get("metric", "accuracy") != "accuracy"
    budget = config.get("reward", {}).get("answer_tokens", RewardConfig.answer_tokens)
    target, url = result["target"], "http://localhost:8000"
    if is_served(target):
        url, _, target = target.partition("#")
    elif target in LABS:
        target = str(lab_folder(target, "target"))
    values = {"template": result["template"], "prompt": result["prompt"], "target": target}
    values |= {"asked": TURN if chat else "text", "answer": "message.content" if chat else "text"}
    values |= {"tokens": str(budget), "cut": ONE_LINE} if text else {"tokens": str(WORD), "cut": "answer.strip()"}
    model = repr(target) if target else "client.models.list().data[0].id"  # the server's only one
    values["ask"] = f"{'chat.' * chat}completions.create(model={model}, {f'messages={TURN}' if chat else 'prompt=text'}"
    ways = [("On the command line", command)]
    if not is_served(result["target"]):
        ways.append(("With transformers", TRANSFORMERS.format(**values)))
    if result["target"] not in LABS:  # a toy, which nobody serves
        ways.append(("With an OpenAI-compatible server", OPENAI.format(**values, url=f"{url}/v1")))
    return ways
