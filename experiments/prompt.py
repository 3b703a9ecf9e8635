"""Uses a finished run: the instruction for an input, and what the target makes of it.

    appo prompt --run runs/mixed-... --input "premise : ... focus : place" --answer
    appo prompt --run runs/mixed-... --file inputs.txt --answer > answers.jsonl

A run in mode fixed has one instruction for all inputs, one in mode tte writes one for each. Inputs are texts as the
target reads them; `\\n` stands for a line break. A file has one input per line, or "input" in each .jsonl row.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.command import Parser, in_order
from experiments.runlog import read_result
from experiments.session import Run, open_run
from rewards.generation import generate
from rewards.reward import STOPS, GenerationReward
from rewards.target import NO_NUMBERS
from tasks.sources import read_rows
from tasks.task import TaskError


def instructions(run: Run, inputs: Sequence[str]) -> list[str]:
    """The run's instruction for each input."""
    if run.config.mode == "tte":
        return run.editor.write(inputs)
    return [read_result(run.log.folder)["prompt"]] * len(inputs)


def answers(run: Run, prompts: Sequence[str], inputs: Sequence[str]) -> list[dict[str, Any]]:
    """The target's answer to each input under its prompt; with label words or letters also their probabilities."""
    target = run.reward.target
    if isinstance(run.reward, GenerationReward):
        said = generate(target, prompts, inputs, run.reward.answer_tokens, STOPS)
        return [{"answer": text} for text in said]
    logits = target.pair_logits(prompts, inputs)
    if logits.isnan().any():
        raise FloatingPointError(NO_NUMBERS)
    rows = logits.softmax(-1).tolist()
    found = [dict(zip(run.data.words, row, strict=True)) for row in rows]
    return [{"answer": max(row, key=lambda word: row[word]), "probabilities": row} for row in found]


def read_inputs(path: Path) -> list[str]:
    """The inputs of a file.

    Raises:
        TaskError: no such file, no inputs in it, or a row without one.
    """
    if not path.is_file():
        raise TaskError(f"no file {str(path)!r}")
    if path.suffix == ".jsonl":
        rows = list(read_rows(path))
        bad = next((where for where, row in rows if not _is_text(row.get("input"))), None)
        if bad:
            raise TaskError(f"{bad}: no text under 'input'")
        return [row["input"] for _, row in rows]
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 at byte {error.start}") from error
    lines = [line.replace("\\n", "\n") for line in text.splitlines() if line.strip()]
    if not lines:
        raise TaskError(f"{path}: the file has no inputs")
    return lines


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)  # no half characters


@in_order
def main(argv: Sequence[str]) -> int:
    """Prints the instruction for one input, or a JSON line for each of a file; returns the exit code."""
    parser = Parser(prog="appo prompt", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--input", help="one input")
    group.add_argument("--file", type=Path, help="one input per line, or .jsonl")
    parser.add_argument("--answer", action="store_true", help="the target's answer as well")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")
    options = parser.parse_args(argv)
    inputs = [options.input.replace("\\n", "\n")] if options.input is not None else read_inputs(options.file)
    run = open_run(options.run, options.trust_remote_code)
    started = time.perf_counter()
    prompts = instructions(run, inputs)
    replies = answers(run, prompts, inputs) if options.answer else [{} for _ in inputs]
    seconds = time.perf_counter() - started
    print(f"{1000 * seconds / len(inputs):.1f} ms per input, {len(inputs)} in all, after loading", file=sys.stderr)
    if options.input is None:
        for text, prompt, reply in zip(inputs, prompts, replies, strict=True):
            print(json.dumps({"input": text, "prompt": prompt, **reply}, ensure_ascii=False))
        return 0
    print(prompts[0])
    if options.answer:
        shown = ", ".join(f"{word} {p:.3f}" for word, p in replies[0].get("probabilities", {}).items())
        print(f"answer: {replies[0]['answer']}" + (f"  ({shown})" if shown else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
