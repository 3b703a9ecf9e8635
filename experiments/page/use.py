"""How to use a result: with transformers, with any server that speaks OpenAI's protocol, and with `appo prompt`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.config import is_served

TRANSFORMERS = """from transformers import pipeline

template, prompt = {template!r}, {prompt!r}
target = pipeline("text-generation", model={target!r})
text = template.format(prompt=prompt, input="...")
print(target(text, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"])
"""
OPENAI = """from openai import OpenAI

template, prompt = {template!r}, {prompt!r}
client = OpenAI(base_url={url!r}, api_key="none")
text = template.format(prompt=prompt, input="...")
answer = client.completions.create(model={target!r}, prompt=text, max_tokens=8, temperature=0)
print(answer.choices[0].text)
"""


def snippets(result: Mapping[str, Any], folder: str) -> list[tuple[str, str]]:
    """(title, code) of each way to use the result; a prompt per input needs the agent, hence `appo prompt` alone."""
    command = f'appo prompt --run {folder} --input "..." --answer'
    if result["prompt"] is None:
        return [("On the command line", command)]
    values = {name: result[name] for name in ("template", "prompt", "target")}
    here = [("With transformers", TRANSFORMERS.format(**values))]
    values["url"] = "http://localhost:8000/v1"
    if is_served(result["target"]):
        url, _, values["target"] = result["target"].partition("#")
        values["url"], here = f"{url}/v1", []
    return [
        ("On the command line", command),
        *here,
        ("With an OpenAI-compatible server", OPENAI.format(**values)),
    ]
