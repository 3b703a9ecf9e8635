"""How to use a result: with transformers, with any server that speaks OpenAI's protocol, and with `appo prompt`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from experiments.config import LABS, is_served, lab_folder

TRANSFORMERS = """from transformers import pipeline

template, prompt = {template!r}, {prompt!r}
target = pipeline("text-generation", model={target!r})
text = template.replace("{{input}}", "...").replace("{{prompt}}", prompt)  # a prompt may hold {{input}}
print(target({asked}, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"])
"""
OPENAI = """from openai import OpenAI

template, prompt = {template!r}, {prompt!r}
client = OpenAI(base_url={url!r}, api_key="none")
text = template.replace("{{input}}", "...").replace("{{prompt}}", prompt)  # a prompt may hold {{input}}
answer = client.{ask}, max_tokens=8, temperature=0)
print(answer.choices[0].{answer})
"""
TURN = '[{"role": "user", "content": text}]'


def snippets(result: Mapping[str, Any], folder: str, chat: bool) -> list[tuple[str, str]]:
    """(title, code) of each way to use the result; a prompt per input needs the agent, hence `appo prompt` alone.

    Args:
        result: what best_prompt.json holds.
        folder: of the run.
        chat: the target was asked in its chat template, so it is to be asked in it again.
    """
    command = f'appo prompt --run {shlex.quote(folder)} --input "..." --answer'
    if result["prompt"] is None:
        return [("On the command line", command)]
    target, url = result["target"], "http://localhost:8000"
    if is_served(target):
        url, _, target = target.partition("#")
    elif target in LABS:
        target = str(lab_folder(target, "target"))
    values = {"template": result["template"], "prompt": result["prompt"], "target": target}
    values |= {"asked": TURN if chat else "text", "answer": "message.content" if chat else "text"}
    model = repr(target) if target else "client.models.list().data[0].id"  # the server's only one
    values["ask"] = f"{'chat.' * chat}completions.create(model={model}, {f'messages={TURN}' if chat else 'prompt=text'}"
    ways = [("On the command line", command)]
    if not is_served(result["target"]):
        ways.append(("With transformers", TRANSFORMERS.format(**values)))
    if result["target"] not in LABS:  # a toy, which nobody serves
        ways.append(("With an OpenAI-compatible server", OPENAI.format(**values, url=f"{url}/v1")))
    return ways
