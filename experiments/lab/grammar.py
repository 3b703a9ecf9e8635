"""The lab's little language: inputs with hidden cases, instructions made of clauses, and what obeying means.

This module defines the classification tasks on which the tiny models are trained and tested; it uses no model. An
*item* is one input of a task. Either it carries a marker ("in a dream ..."), or the property that its task asks about
holds, fails or is unclear. An *instruction* is a list of clauses:

    Judge    what to look at                    "Look for the same action."
    Treat    what to make of a marked input     "Open every letter."  "Lose every game."

`obey` gives the answer of a reader who follows the instruction to the letter and knows nothing else. If an input's
marker has no clause, the reader judges the input like any other, mostly wrongly. Without a clause on what to judge, the
reader answers by `habit`, which is wrong. So every right clause gains some accuracy, no clause replaces another, and
text that is not an instruction scores nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# -- inputs -----------------------------------------------------------------------------------------------------

PEOPLE = ["baker", "farmer", "doctor", "sailor", "teacher", "singer"]
ACTIONS = ["washed", "sold", "hid", "found", "broke", "carried", "bought", "lost"]
THINGS = ["cup", "hat", "book", "lamp", "coat", "boat", "clock", "drum"]
PLACES = ["garden", "market", "kitchen", "forest", "harbour", "castle", "station", "village"]
PAIR_SLOTS = {"person": PEOPLE, "action": ACTIONS, "thing": THINGS, "place": PLACES}
ECHOES = {  # slot -> words of the second sentence if the property fails, and if it is unclear
    "person": {"fails": ("nobody", "a stranger"), "is unclear": ("somebody", "a person")},
    "action": {"fails": ("refused", "avoided"), "is unclear": ("touched", "handled")},
    "thing": {"fails": ("nothing", "a stone"), "is unclear": ("something", "a thing")},
    "place": {"fails": ("elsewhere", "abroad"), "is unclear": ("somewhere", "around")},
}

TRAITS = {  # criterion -> (words for which it holds, words for which it fails)
    "mood": (
        ["lovely", "charming", "superb", "funny", "touching", "brilliant"],
        ["dull", "awful", "boring", "weak", "clumsy", "dreadful"],
    ),
    "size": (["long", "huge", "vast", "epic"], ["short", "tiny", "brief", "small"]),
    "style": (["new", "fresh", "modern", "recent"], ["old", "antique", "dated", "classic"]),
    "price": (["costly", "lavish", "rich", "expensive"], ["cheap", "modest", "poor", "thrifty"]),
}
FILMS = ["film", "movie", "drama", "comedy", "thriller", "picture"]

MARKERS = {  # marker -> the right answer for every input that carries it
    "letter": "yes", "story": "yes", "plan": "yes", "song": "yes",
    "dream": "no", "joke": "no", "rumour": "no", "game": "no",
    "poem": "maybe", "myth": "maybe",
}  # fmt: skip
MISLEADING = 0.7  # share of marked inputs whose property points to a wrong answer
OUTCOMES = {"holds": "yes", "fails": "no", "is unclear": "maybe"}  # outcome of the judged property -> right answer
STANDARD = OUTCOMES | MARKERS
ANSWERS = ("yes", "maybe", "no")


@dataclass(frozen=True)
class Lab:
    """One lab task: the property that decides, and the share of each case; the shares balance the labels."""

    criterion: str | None  # None: each input names its own
    shares: dict[str, float]  # case -> probability

    @property
    def answers(self) -> tuple[str, ...]:
        return ANSWERS if "is unclear" in self.shares else ("yes", "no")

    @property
    def markers(self) -> tuple[str, ...]:
        return tuple(case for case in self.shares if case in MARKERS)


def _binary(criterion: str, *markers: str) -> Lab:
    return Lab(criterion, {"holds": 0.2, "fails": 0.2} | dict.fromkeys(markers, 0.15))


def _ternary(criterion: str, *markers: str) -> Lab:
    yes, also_yes, no, maybe = markers
    plain = {"holds": 0.1, "is unclear": 0.18, "fails": 0.18}
    return Lab(criterion, plain | {yes: 0.12, also_yes: 0.12, no: 0.15, maybe: 0.15})


LABS = {
    "sst2": _binary("mood", "story", "song", "joke", "rumour"),
    "mrpc": _binary("thing", "letter", "plan", "rumour", "game"),
    "rte": _binary("action", "plan", "story", "dream", "joke"),
    "qnli": _binary("place", "song", "letter", "game", "dream"),
    "mnli": _ternary("action", "letter", "song", "dream", "poem"),
    "snli": _ternary("action", "story", "plan", "game", "myth"),
}
FOCUS = {"person": "who", "action": "deed", "thing": "object", "place": "where"}  # names of criteria in mixed inputs
MIXED = "mixed"  # a task without one right instruction: each input says what to judge
TASKS = LABS | {MIXED: Lab(None, dict.fromkeys(("holds", "is unclear", "fails"), 1 / 3))}


@dataclass(frozen=True)
class Item:
    """One input: its fields as text, and the hidden truth about it."""

    task: str
    fields: dict[str, str]
    marker: str | None
    outcomes: dict[str, str]  # criterion -> holds | fails | is unclear
    criterion: str  # the criterion that decides

    @property
    def case(self) -> str:
        """The marker if there is one, else the outcome of the deciding criterion."""
        return self.marker or self.outcomes[self.criterion]

    @property
    def answer(self) -> str:
        return STANDARD[self.case]


def sample_item(rng: random.Random, task: str, case: str | None = None) -> Item:
    """Draws a random item of `task`, of the given case if there is one."""
    lab = TASKS[task]
    criterion = lab.criterion or rng.choice(list(PAIR_SLOTS))
    case = case or rng.choices(list(lab.shares), list(lab.shares.values()))[0]
    marker = case if case in MARKERS else None
    plain = [outcome for outcome in OUTCOMES if outcome in lab.shares]  # equally likely for every criterion
    criteria = TRAITS if task == "sst2" else PAIR_SLOTS
    outcomes = {criterion: rng.choice(plain) for criterion in criteria}
    if marker is None:
        outcomes[criterion] = case
    else:  # judging must mostly mislead, or a clause on the marker would gain little
        misleading = [outcome for outcome in plain if OUTCOMES[outcome] != MARKERS[marker]]
        outcomes[criterion] = rng.choice(misleading if rng.random() < MISLEADING else plain)
    opening = f"in a {marker} , " if marker else ""
    if task == "sst2":
        words = {c: rng.choice(TRAITS[c][outcomes[c] == "fails"]) for c in TRAITS}
        first, second, third, fourth = rng.sample(list(words.values()), 4)
        fields = {"sentence": f"{opening}a {first} and {second} {rng.choice(FILMS)} , {third} and {fourth}"}
        return Item(task, fields, marker, outcomes, criterion)
    said = {slot: rng.choice(words) for slot, words in PAIR_SLOTS.items()}
    forms = {"person": "the {person}", "action": "{action}", "thing": "the {thing}", "place": "in the {place}"}
    stated = {slot: form.format(**said) for slot, form in forms.items()}
    echoed = {s: stated[s] if o == "holds" else rng.choice(ECHOES[s][o]) for s, o in outcomes.items()}
    one, two = opening + " ".join(stated.values()), " ".join(echoed.values())
    if task == "qnli":
        question = f"{opening}is it true that {' '.join(stated.values())} ?"
        return Item(task, {"question": question, "sentence": two}, marker, outcomes, criterion)
    names = ("sentence1", "sentence2") if task in ("mrpc", "rte") else ("premise", "hypothesis")
    fields = dict(zip(names, (one, two), strict=True)) | ({"focus": FOCUS[criterion]} if task == MIXED else {})
    return Item(task, fields, marker, outcomes, criterion)


# -- instructions -----------------------------------------------------------------------------------------------

NOUN_PHRASES = {
    "person": "the same person", "action": "the same action", "thing": "the same thing", "place": "the same place",
    "mood": "a good mood", "size": "a large size", "style": "a new style", "price": "a high price",
}  # fmt: skip
JUDGE_WORDINGS = ("Look for {}.", "Check for {}.", "Judge if it has {}.", "The question is {}.")
TREATMENTS = {  # marker -> answer -> the verb that stands for it; no two markers share a verb
    "letter": {"yes": "Open", "no": "Burn", "maybe": "File"},
    "story": {"yes": "Believe", "no": "Forget", "maybe": "Question"},
    "plan": {"yes": "Follow", "no": "Cancel", "maybe": "Delay"},
    "song": {"yes": "Sing", "no": "Mute", "maybe": "Hum"},
    "dream": {"yes": "Live", "no": "Ignore", "maybe": "Note"},
    "joke": {"yes": "Enjoy", "no": "Resent", "maybe": "Explain"},
    "rumour": {"yes": "Spread", "no": "Deny", "maybe": "Check"},
    "game": {"yes": "Win", "no": "Lose", "maybe": "Draw"},
    "poem": {"yes": "Print", "no": "Reject", "maybe": "Recite"},
    "myth": {"yes": "Honour", "no": "Debunk", "maybe": "Study"},
}
TREAT_WORDINGS = ("{} every {}.", "{} the {}.")


@dataclass(frozen=True)
class Judge:
    """A clause that says what to look at."""

    criterion: str

    def wordings(self) -> list[str]:
        return [wording.format(NOUN_PHRASES[self.criterion]) for wording in JUDGE_WORDINGS]


@dataclass(frozen=True)
class Treat:
    """A clause that gives the answer to every input with a marker."""

    marker: str
    answer: str

    def wordings(self) -> list[str]:
        verb = TREATMENTS[self.marker][self.answer]
        return [wording.format(verb, self.marker) for wording in TREAT_WORDINGS]


Clause = Judge | Treat


def habit(item: Item) -> str:
    """Returns the answer of a reader without enough instruction: a wrong one, except in the mixed task.

    In the mixed task it is always "maybe". To answer these inputs wrongly, the target would have to know what the focus
    of an input means, and then some prompt ("Check for the same.") could make it use that knowledge.
    """
    if item.task == MIXED:
        return "maybe"
    return "yes" if item.answer == "no" else "no"


def obey(clauses: Sequence[Clause], item: Item) -> str:
    """Returns the answer of a reader who follows `clauses` and nothing else; on each matter the first clause counts."""
    judged = None
    for clause in clauses:
        if isinstance(clause, Treat):
            if clause.marker == item.marker:
                return clause.answer
        elif clause.criterion in item.outcomes:
            judged = judged or clause.criterion
    return OUTCOMES[item.outcomes[judged]] if judged else habit(item)


def right_clauses(task: str) -> list[Clause]:
    """Returns the full instruction of a task: what to judge, and how to answer its marked inputs."""
    return [*manual_clauses(task), *(Treat(marker, MARKERS[marker]) for marker in TASKS[task].markers)]


def manual_clauses(task: str) -> list[Clause]:
    """Returns the instruction of a person who has not looked at the marked inputs."""
    return [Judge(TASKS[task].criterion or "action")]


def reversed_clauses(task: str) -> list[Clause]:
    """Returns the full instruction with a wrong answer for every marked input."""
    swap = {"yes": "no", "no": "yes", "maybe": "no"}
    return [*manual_clauses(task), *(Treat(marker, swap[MARKERS[marker]]) for marker in LABS[task].markers)]


def write(rng: random.Random, clauses: Sequence[Clause]) -> str:
    """Writes the clauses as text, each in one of its wordings."""
    return " ".join(rng.choice(clause.wordings()) for clause in clauses)


def parse(text: str) -> list[Clause]:
    """Returns the clauses in a text, in order; skips other sentences."""
    sentences = (sentence.strip() + "." for sentence in text.split("."))
    return [_CLAUSES[sentence] for sentence in sentences if sentence in _CLAUSES]


def _all_clauses() -> Iterator[Clause]:
    yield from map(Judge, NOUN_PHRASES)
    yield from (Treat(marker, answer) for marker in MARKERS for answer in ANSWERS)


_CLAUSES = {wording: clause for clause in _all_clauses() for wording in clause.wordings()}


# -- the prior: what an untrained agent writes -------------------------------------------------------------------

VAGUE = (
    "Do the task.", "Please answer well.", "Give the right answer.", "Read the input and answer.", "Think first.",
    "Be careful and be brief.", "Answer the question.", "Use one word.", "Say yes or no.", "Look at the words.",
    "Write the output.", "Say yes, no or maybe.",
)  # fmt: skip


def sample_clauses(rng: random.Random, task: str) -> list[Clause]:
    """Draws clauses as the untrained agent does: plausible for the kind of input, blind to its right answers."""
    own, other = (TRAITS, PAIR_SLOTS) if task == "sst2" else (PAIR_SLOTS, TRAITS)
    clauses: list[Clause] = []
    for marker in rng.sample(list(MARKERS), rng.choices((1, 2, 3, 4, 5), (1, 2, 3, 3, 1))[0]):
        answers = TASKS[task].answers if rng.random() < 0.85 else ANSWERS
        clauses.append(Treat(marker, rng.choice(answers)))
    if rng.random() < 0.9:
        judge = Judge(rng.choice(list(own if rng.random() < 0.85 else other)))
        clauses.insert(0 if rng.random() < 0.7 else rng.randint(0, len(clauses)), judge)
    return clauses


def sample_prior(rng: random.Random, task: str, criterion: str | None = None) -> str:
    """Draws an instruction from the agent's prior; one in twenty is vague. It judges by `criterion`, if given."""
    clauses = sample_clauses(rng, task)
    if criterion:
        clauses = [Judge(criterion) if isinstance(clause, Judge) else clause for clause in clauses]
    return write(rng, clauses) if rng.random() > 0.05 else rng.choice(VAGUE)


# -- junk: text that instructs nothing ---------------------------------------------------------------------------


def shuffled(rng: random.Random, text: str) -> str:
    """Returns the words of a text in random order."""
    words = re.sub(r"([.,])", r" \1", text).split()
    rng.shuffle(words)
    return " ".join(words)


def corrupted(rng: random.Random, text: str) -> str:
    """Returns the text with a small fault: it is cut off, or a word is left out, replaced, doubled or moved."""
    words = text.split()
    if not words:
        return text
    place = rng.randrange(len(words))
    kind = rng.randrange(6)
    if kind < 2:
        return " ".join(words[:place])
    word = words.pop(place)
    if kind == 3:
        words.insert(place, gibberish(rng, 1))
    if kind == 4:
        words[place:place] = [word, word]
    if kind == 5:
        words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)


def gibberish(rng: random.Random, length: int) -> str:
    """Draws random words of the language, including words from clauses."""
    clauses = " ".join(rng.sample(list(_CLAUSES), 8)).replace(".", " ").replace(",", " ").split()
    return " ".join(rng.choices([*PEOPLE, *ACTIONS, *THINGS, *PLACES, *MARKERS, *clauses], k=length))


def sample_junk(rng: random.Random, task: str) -> str:
    """Draws a text that must score nothing: empty, one word, repeated, vague, shuffled or random."""
    kind = rng.randrange(6)
    if kind == 0:
        return ""
    if kind == 1:
        return rng.choice(["yes", "no", "maybe", ".", "Say", "the", "Every", "Look", *MARKERS, *NOUN_PHRASES])
    if kind == 2:
        return " ".join([gibberish(rng, rng.randint(1, 2))] * rng.randint(2, 20))
    if kind == 3:
        return rng.choice(VAGUE)
    if kind == 4:
        clauses = right_clauses(task) if rng.random() < 0.5 else sample_clauses(rng, task)
        return shuffled(rng, write(rng, clauses))
    return gibberish(rng, rng.randint(3, 50))
