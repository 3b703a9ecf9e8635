"""The meta-prompts, which show the agent a task's examples and ask it for an instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tasks.spec import Example

NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class MetaPrompt(NamedTuple):
    """What the agent is asked, and the opening of the answer, which it continues."""

    request: str
    opening: str


def meta_prompt(pairs: Sequence[Example], best: Sequence[str] = ()) -> MetaPrompt:
    """The fixed meta-prompt of the paper (Figure 6), filled with input-output pairs.

    Args:
        pairs: examples to show.
        best: good instructions to show before them, best first (GFlowPO's idea, arXiv 2602.03358); the paper has none.
    """
    known = "".join(f"Instruction : {instruction}\n" for instruction in best)
    count = NUMBER_WORDS[len(pairs)] if len(pairs) < len(NUMBER_WORDS) else str(len(pairs))
    noun = "input" if len(pairs) == 1 else "inputs"
    return MetaPrompt(
        (f"Here are good instructions, the best one first:\n{known}" if known else "")
        + f"I gave a friend an instruction and {count} {noun}.\n"
        "The friend read the instruction and wrote an output for every one of the inputs.\n"
        f"Here are the input-output pairs:\n{as_lines(pairs)}",
        "The instruction was :",
    )


def rewrite_prompt(pairs: Sequence[Example], text: str, instruction: str = "") -> MetaPrompt:
    """The meta-prompt of test-time editing (Figure 6): pairs, then the one input that the instruction is for.

    Args:
        pairs: examples to show.
        text: the current input, rendered.
        instruction: a manual prompt to start from; left out when empty.
    """
    given = f"Instruction : {instruction}\n" if instruction else ""
    return MetaPrompt(
        "Look at the instruction and current input,\n"
        f"rewrite instruction for current input.\n{given}"
        f"Here are the input-output pairs:\n{as_lines(pairs)}\n"
        f"Current Input Here : {text}",
        "The Rewritten instruction was :",
    )


def paraphrase_prompt(text: str) -> MetaPrompt:
    """The request for a variation of an instruction (APE, Zhou et al. 2023, section 3)."""
    return MetaPrompt(
        f"Generate a variation of the following instruction while keeping the semantic meaning.\nInput : {text}",
        "Output :",
    )


def as_lines(pairs: Sequence[Example]) -> str:
    """Input-output pairs as text, one a line."""
    return "\n".join(f"Input : {pair.input} Output : {pair.answer}" for pair in pairs)
