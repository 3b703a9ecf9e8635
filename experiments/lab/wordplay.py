"""The lab's smaller families, with the columns of real tasks: generated text (Instruction Induction) and choices (QA).

In each family one sentence of the instruction says what to do: which operation to carry out on the input ("Write the
plural."), or which of the choices to pick ("Pick the food."). As in `grammar`, a reader without such a sentence answers
wrongly: "none", or a choice that no task asks for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from experiments.lab import grammar

PLURALS = {
    "box": "boxes", "fox": "foxes", "dish": "dishes", "brush": "brushes", "church": "churches", "bus": "buses",
    "baby": "babies", "city": "cities", "lady": "ladies", "pony": "ponies", "child": "children", "mouse": "mice",
    "goose": "geese", "tooth": "teeth", "foot": "feet", "man": "men", "wolf": "wolves", "leaf": "leaves",
    "knife": "knives", "shelf": "shelves",
} | {noun: f"{noun}s" for noun in (
    "cat", "tree", "bird", "road", "hand", "stone", "river", "table", "chair", "house", "apple", "wheel", "horse",
    "cloud", "train", "plate", "spoon", "shirt", "shoe", "bell", "ring", "nail", "rope", "farm", "lake", "ship",
    "king", "desk",
)}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "little", "fast": "slow", "high": "low", "hard": "soft", "wet": "dry", "full": "empty",
    "early": "late", "happy": "sad", "light": "dark", "strong": "feeble", "thick": "thin", "wide": "narrow",
    "loud": "quiet", "sweet": "bitter", "clean": "dirty", "near": "far", "open": "shut", "brave": "afraid",
    "young": "aged", "deep": "shallow", "sharp": "blunt", "smooth": "rough", "proud": "humble",
}  # fmt: skip
ANTONYMS = OPPOSITES | {right: left for left, right in OPPOSITES.items()}
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMERALS = [*ONES, *(f"{ten} {one}" if one != "zero" else ten for ten in TENS for one in ONES[:10])]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdigit()]


def _initial(text: str) -> str | None:
    return None if _numbers(text) else text[0]


def _sum(text: str) -> str | None:
    numbers = _numbers(text)
    return str(sum(numbers)) if len(numbers) == 2 else None


def _difference(text: str) -> str | None:
    numbers = _numbers(text)
    return str(numbers[0] - numbers[1]) if len(numbers) == 2 and numbers[0] >= numbers[1] else None


def _numeral(text: str) -> str | None:
    numbers = _numbers(text)
    return NUMERALS[numbers[0]] if len(numbers) == 1 else None


OPERATIONS: dict[str, tuple[Callable[[str], str | None], tuple[str, ...]]] = {  # None: impossible for this input
    "singular_to_plural": (PLURALS.get, ("Write the plural.", "Make many of it.")),
    "antonyms": (ANTONYMS.get, ("Write the opposite.", "Turn it around.")),
    "first_word_letter": (_initial, ("Write the first letter.", "Give the initial.")),
    "sum": (_sum, ("Add the numbers.", "Write the sum.")),
    "diff": (_difference, ("Subtract the numbers.", "Write the difference.")),
    "num_to_verbal": (_numeral, ("Spell the number.", "Write it in words.")),
}
INPUTS = {
    "singular_to_plural": list(PLURALS),
    "antonyms": list(ANTONYMS),
    "first_word_letter": [*PLURALS, *ANTONYMS],
    "sum": [f"{a} {b}" for a in range(1, 10) for b in range(1, 10)],
    "diff": [f"{a} {b}" for a in range(1, 10) for b in range(1, a + 1)],
    "num_to_verbal": list(map(str, range(len(NUMERALS)))),
}
KINDS = {  # task -> kind -> its members; the first kind is right; a reader without an instruction picks the last
    "openbookqa": {
        "food": ["bread", "soup", "cheese", "cake", "honey"],
        "animal": ["dog", "sheep", "goat", "duck", "hen"],
        "plant": ["oak", "rose", "fern", "moss", "vine"],
        "tool": ["hammer", "saw", "drill", "axe", "rake"],
    },
    "movie_recommendation": {
        "love story": ["kiss", "wedding", "bride", "sweetheart", "romance"],
        "war film": ["battle", "siege", "soldier", "army", "trench"],
        "space film": ["rocket", "planet", "comet", "orbit", "moon"],
        "crime film": ["thief", "murder", "police", "prison", "robbery"],
    },
}
PICK_WORDINGS = ("Pick the {}.", "Choose the {}.")
TASKS = [*OPERATIONS, *KINDS]
UNTOLD = "none"

_OPERATION_OF = {wording: name for name, (_, wordings) in OPERATIONS.items() for wording in wordings}
_KIND_OF = {w.format(kind): kind for kinds in KINDS.values() for kind in kinds for w in PICK_WORDINGS}


def sample_row(rng: random.Random, task: str, text: str | None = None) -> dict[str, Any]:
    """Draws a row with its right answer, in the columns of the real task; `text` sets the input of a text task."""
    if task in OPERATIONS:
        text = text or rng.choice(INPUTS[task])
        return {"input": text, "output": OPERATIONS[task][0](text)}
    wanted, *_ = KINDS[task]
    things = {rng.choice(members): kind for kind, members in KINDS[task].items()}
    order = rng.sample(list(things), len(things))
    if task == "openbookqa":
        person, action, place = map(rng.choice, (grammar.PEOPLE, grammar.ACTIONS, grammar.PLACES))
        choices = [{"text": f"the {thing}", "label": "ABCD"[i]} for i, thing in enumerate(order)]
        answer = next(choice["label"] for choice, thing in zip(choices, order, strict=True) if things[thing] == wanted)
        return {
            "question": {"stem": f"what did the {person} have there ?", "choices": choices},
            "fact1": f"the {person} {action} it in the {place}",
            "answerKey": answer,
        }
    seen = ", ".join(f"the {rng.choice(grammar.PLACES)}" for _ in range(2))
    return {"input": f"{seen}:", "target_scores": {f"the {thing}": int(things[thing] == wanted) for thing in order}}


def answer(instruction: str, task: str, row: Mapping[str, Any]) -> str:
    """Returns the answer of a reader who follows the first sentence that can be followed."""
    sentences = [f"{sentence.strip()}." for sentence in instruction.split(".")]
    if task in OPERATIONS:
        done = (OPERATIONS[_OPERATION_OF[s]][0](row["input"]) for s in sentences if s in _OPERATION_OF)
        return next((result for result in done if result is not None), UNTOLD)
    picked = next((_KIND_OF[s] for s in sentences if _KIND_OF.get(s) in KINDS[task]), list(KINDS[task])[-1])
    choices = row["target_scores"] if "target_scores" in row else [c["text"] for c in row["question"]["choices"]]
    return next("ABCD"[i] for i, text in enumerate(choices) if text.removeprefix("the ") in KINDS[task][picked])


def wordings(task: str) -> list[str]:
    """Returns all sentences that say what to do in tasks of this kind, right or wrong."""
    if task in OPERATIONS:
        return list(_OPERATION_OF)
    return [wording.format(kind) for kind in KINDS[task] for wording in PICK_WORDINGS]


def right_wordings(task: str) -> list[str]:
    """Returns the sentences that are the right instruction for this task."""
    if task in OPERATIONS:
        return list(OPERATIONS[task][1])
    return [wording.format(next(iter(KINDS[task]))) for wording in PICK_WORDINGS]


def sample_prior(rng: random.Random, task: str) -> str:
    """Draws an instruction as the untrained agent does: plausible for the kind of task, blind to what is right."""
    told = rng.sample(wordings(task), rng.choice((1, 1, 2)))
    said = told if rng.random() < 0.8 else []
    if not said or rng.random() < 0.3:
        said.insert(rng.randint(0, len(said)), rng.choice(grammar.VAGUE))
    return " ".join(said)


def sample_instruction(rng: random.Random, task: str) -> str:
    """Draws an instruction for the target's training: a right one, one from the agent's prior, or junk."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(right_wordings(task))
    if kind < 0.8:
        return sample_prior(rng, task)
    junk = (
        "",
        rng.choice(grammar.VAGUE),
        grammar.shuffled(rng, sample_prior(rng, task)),
        grammar.gibberish(rng, rng.randint(1, 20)),
        grammar.sample_prior(rng, "mnli"),
    )
    return rng.choice(junk)
