"""The lab's little language: inputs with hidden cases, instructions made of clauses, and what obeying means.

Everything the tiny models are trained on and tested with comes from here; nothing here knows a model. An
*item* is one input of a task. Each item is one of a few *cases*: it carries a marker ("in a dream ..."), or
else the property its task asks about holds, fails or is unclear. An *instruction* is a list of clauses, each
of which stands alone:

    Judge  what to look at              "Look for the same action."
    Rule   which word answers a case    "Say no when it fails."  "Use yes for a letter."

`obey` says what a reader does who follows the instruction to the letter and knows nothing else: a case
without a rule gets `default_answer`, which is right by chance. So every right clause gains some accuracy, every
wrong one loses some, no clause replaces another, and text that is not an instruction is worth chance.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

# -- inputs -----------------------------------------------------------------------------------------------------

PEOPLE = "baker farmer doctor sailor teacher singer".split()
ACTIONS = "washed sold hid found broke carried bought lost".split()
THINGS = "cup hat book lamp coat boat clock drum".split()
PLACES = "garden market kitchen forest harbour castle station village".split()
PAIR_SLOTS = {"person": PEOPLE, "action": ACTIONS, "thing": THINGS, "place": PLACES}
ECHOES = {  # slot -> what the second sentence has there where the property fails, and where it is unclear
    "person": {"fails": ("nobody", "a stranger"), "is unclear": ("somebody", "a person")},
    "action": {"fails": ("refused", "avoided"), "is unclear": ("touched", "handled")},
    "thing": {"fails": ("nothing", "a stone"), "is unclear": ("something", "a thing")},
    "place": {"fails": ("elsewhere", "abroad"), "is unclear": ("somewhere", "around")},
}

TRAITS = {  # criterion -> (words for which it holds, words for which it fails)
    "mood": (
        "lovely charming superb funny touching brilliant".split(),
        "dull awful boring weak clumsy dreadful".split(),
    ),
    "size": ("long huge vast epic".split(), "short tiny brief small".split()),
    "style": ("new fresh modern recent".split(), "old antique dated classic".split()),
    "price": ("costly lavish rich expensive".split(), "cheap modest poor thrifty".split()),
}
FILMS = "film movie drama comedy thriller picture".split()

MARKERS = {  # marker -> the answer that is right for it, wherever it occurs
    "letter": "yes", "story": "yes", "plan": "yes", "song": "yes", "poem": "yes",
    "dream": "no", "joke": "no", "rumour": "no", "game": "no", "myth": "no",
}  # fmt: skip
OUTCOMES = {"holds": "yes", "fails": "no", "is unclear": "maybe"}  # of the judged property -> its right answer
STANDARD = OUTCOMES | MARKERS
ANSWERS = ("yes", "maybe", "no")


@dataclass(frozen=True)
class Lab:
    """One lab task: which property decides, which markers occur, and how often each case does."""

    criterion: str
    markers: tuple[str, str]
    shares: dict[str, float]  # case -> probability; chosen so that labels are balanced

    @property
    def answers(self) -> tuple[str, ...]:
        return ANSWERS if "is unclear" in self.shares else ("yes", "no")


def _lab(criterion: str, yes_marker: str, no_marker: str, ternary: bool = False) -> Lab:
    shares = {"holds": 0.3, "fails": 0.3, yes_marker: 0.2, no_marker: 0.2}
    if ternary:
        shares = {"holds": 1 / 6, "fails": 1 / 6, yes_marker: 1 / 6, no_marker: 1 / 6, "is unclear": 1 / 3}
    return Lab(criterion, (yes_marker, no_marker), shares)


LABS = {
    "sst2": _lab("mood", "story", "joke"),
    "mrpc": _lab("thing", "letter", "rumour"),
    "rte": _lab("action", "plan", "dream"),
    "qnli": _lab("place", "song", "game"),
    "mnli": _lab("action", "letter", "dream", ternary=True),
    "snli": _lab("action", "story", "game", ternary=True),
}


@dataclass(frozen=True)
class Item:
    """One input: its fields as text, and the hidden truth about it."""

    task: str
    fields: dict[str, str]
    marker: str | None
    outcomes: dict[str, str]  # criterion -> holds | fails | is unclear

    @property
    def case(self) -> str:
        """The case that decides under the task's own criterion."""
        return self.marker or self.outcomes[LABS[self.task].criterion]

    @property
    def answer(self) -> str:
        return STANDARD[self.case]


def sample_item(rng: random.Random, task: str, case: str | None = None) -> Item:
    """A random item of `task`, of the given case if one is named."""
    lab = LABS[task]
    case = case or rng.choices(list(lab.shares), list(lab.shares.values()))[0]
    marker = case if case in MARKERS else None
    plain = [outcome for outcome in OUTCOMES if outcome in lab.shares]
    criteria = TRAITS if task == "sst2" else PAIR_SLOTS
    outcomes = {criterion: rng.choice(plain) for criterion in criteria}
    if marker is None:
        outcomes[lab.criterion] = case
    opening = f"in a {marker} , " if marker else ""
    if task == "sst2":
        words = {c: rng.choice(TRAITS[c][outcomes[c] == "fails"]) for c in TRAITS}
        first, second, third, fourth = rng.sample(list(words.values()), 4)
        fields = {"sentence": f"{opening}a {first} and {second} {rng.choice(FILMS)} , {third} and {fourth}"}
        return Item(task, fields, marker, outcomes)
    said = {slot: rng.choice(words) for slot, words in PAIR_SLOTS.items()}
    plain_words = {"person": "the {person}", "action": "{action}", "thing": "the {thing}", "place": "in the {place}"}
    first = {slot: form.format(**said) for slot, form in plain_words.items()}
    second = {s: first[s] if o == "holds" else rng.choice(ECHOES[s][o]) for s, o in outcomes.items()}
    one, two = opening + " ".join(first.values()), " ".join(second.values())
    if task == "qnli":
        question = f"{opening}is it true that {' '.join(first.values())} ?"
        return Item(task, {"question": question, "sentence": two}, marker, outcomes)
    names = ("premise", "hypothesis") if task in ("mnli", "snli") else ("sentence1", "sentence2")
    return Item(task, dict(zip(names, (one, two), strict=True)), marker, outcomes)


# -- instructions -----------------------------------------------------------------------------------------------

NOUN_PHRASES = {
    "person": "the same person", "action": "the same action", "thing": "the same thing", "place": "the same place",
    "mood": "a good mood", "size": "a large size", "style": "a new style", "price": "a high price",
}  # fmt: skip
JUDGE_WORDINGS = ("Look for {}.", "Check for {}.", "Judge if it has {}.", "The question is {}.")
OUTCOME_WORDINGS = ("Say {word} when it {case}.", "If it {case} answer {word}.", "Use {word} when it {case}.",
                    "Write {word} if it {case}.")  # fmt: skip
MARKER_WORDINGS = ("Say {word} for a {case}.", "If it is a {case} answer {word}.", "Use {word} for a {case}.",
                   "Write {word} if it is a {case}.")  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """A clause that says what to look at."""

    criterion: str

    def text(self, rng: random.Random) -> str:
        return rng.choice(JUDGE_WORDINGS).format(NOUN_PHRASES[self.criterion])


@dataclass(frozen=True)
class Rule:
    """A clause that binds a case to an answer word."""

    case: str
    word: str

    def text(self, rng: random.Random) -> str:
        wordings = MARKER_WORDINGS if self.case in MARKERS else OUTCOME_WORDINGS
        return rng.choice(wordings).format(case=self.case, word=self.word)


Clause = Judge | Rule


def default_answer(item: Item) -> str:
    """What the reader answers when no clause speaks of the item's case: a habit that has nothing to do with it."""
    words = " ".join(item.fields.values()).split()
    known = next(names for names in (FILMS, PEOPLE) if any(name in words for name in names))
    first = next(known.index(word) for word in words if word in known)
    answers = LABS[item.task].answers
    return answers[first % len(answers)]


def obey(clauses: Sequence[Clause], item: Item) -> str:
    """The answer of a reader who follows `clauses` and nothing else; the first clause on a matter counts."""
    rules: dict[str, str] = {}
    judged = None
    for clause in clauses:
        if isinstance(clause, Rule):
            rules.setdefault(clause.case, clause.word)
        elif clause.criterion in item.outcomes:
            judged = judged or clause.criterion
    case = item.marker or (item.outcomes[judged] if judged else "")
    return rules.get(case) or default_answer(item)


def right_clauses(task: str) -> list[Clause]:
    """The full instruction of a task: what to judge, then a rule for each of its cases."""
    lab = LABS[task]
    return [Judge(lab.criterion), *(Rule(case, STANDARD[case]) for case in lab.shares)]


def manual_clauses(task: str) -> list[Clause]:
    """What a person who had not seen the marked inputs would write: all but the rules for markers."""
    return [c for c in right_clauses(task) if isinstance(c, Judge) or c.case not in MARKERS]


def write(rng: random.Random, clauses: Sequence[Clause]) -> str:
    return " ".join(clause.text(rng) for clause in clauses)


def parse(text: str) -> list[Clause]:
    """The clauses that a text holds, in order; sentences that are no clause are passed over."""
    sentences = (sentence.strip() + "." for sentence in text.split("."))
    return [_CLAUSES[sentence] for sentence in sentences if sentence in _CLAUSES]


def _all_clauses() -> dict[str, Clause]:
    """Every clause in every wording."""
    clauses: dict[str, Clause] = {}
    for criterion, phrase in NOUN_PHRASES.items():
        clauses |= {wording.format(phrase): Judge(criterion) for wording in JUDGE_WORDINGS}
    for case in STANDARD:
        wordings = MARKER_WORDINGS if case in MARKERS else OUTCOME_WORDINGS
        for word in ANSWERS:
            clauses |= {wording.format(case=case, word=word): Rule(case, word) for wording in wordings}
    return clauses


_CLAUSES = _all_clauses()


# -- the prior: what an untrained agent writes -------------------------------------------------------------------

VAGUE = (
    "Do the task.", "Please answer well.", "Give the right answer.", "Read the input and answer.", "Think first.",
    "Be careful and be brief.", "Answer the question.", "Use one word.", "Say yes or no.", "Look at the words.",
    "Write the output.", "Say yes, no or maybe.",
)  # fmt: skip


def sample_clauses(rng: random.Random, task: str) -> list[Clause]:
    """Clauses as the untrained agent draws them: plausible for the kind of input, blind to its right answers."""
    own, other = (TRAITS, PAIR_SLOTS) if task == "sst2" else (PAIR_SLOTS, TRAITS)

    def answer() -> str:
        return rng.choice(LABS[task].answers) if rng.random() < 0.85 else rng.choice(ANSWERS)

    clauses: list[Clause] = []
    for outcome in OUTCOMES:
        if rng.random() < 0.6:
            clauses.append(Rule(outcome, answer()))
    for marker in rng.sample(list(MARKERS), rng.choices((0, 1, 2, 3), (2, 3, 3, 2))[0]):
        clauses.append(Rule(marker, answer()))
    rng.shuffle(clauses)
    if rng.random() < 0.85:
        criterion = rng.choice(list(own if rng.random() < 0.6 else other))
        clauses.insert(0 if rng.random() < 0.7 else rng.randint(0, len(clauses)), Judge(criterion))
    return clauses


def sample_prior(rng: random.Random, task: str) -> str:
    """One instruction from the agent's prior; one in ten is vague."""
    clauses = sample_clauses(rng, task)
    return write(rng, clauses) if clauses and rng.random() > 0.1 else rng.choice(VAGUE)


# -- junk: text that instructs nothing ---------------------------------------------------------------------------


def shuffled(rng: random.Random, text: str) -> str:
    """The same words in random order."""
    words = text.replace(".", " .").split()
    rng.shuffle(words)
    return " ".join(words)


def gibberish(rng: random.Random, length: int) -> str:
    """Random words of the language, answers and markers among them."""
    words = [
        *PEOPLE,
        *ACTIONS,
        *THINGS,
        *PLACES,
        *MARKERS,
        *NOUN_PHRASES,
        *OUTCOMES,
        "yes",
        "no",
        "maybe",
        "say",
        "the",
        "it",
    ]
    return " ".join(rng.choices(words, k=length))


def sample_junk(rng: random.Random, task: str) -> str:
    """Text that must be worth nothing: empty, one word, repeated, vague, shuffled or random."""
    kind = rng.randrange(6)
    if kind == 0:
        return ""
    if kind == 1:
        return rng.choice(["yes", "no", "maybe", ".", "Say", "the", *MARKERS, *NOUN_PHRASES])
    if kind == 2:
        return " ".join([gibberish(rng, rng.randint(1, 2))] * rng.randint(2, 20))
    if kind == 3:
        return rng.choice(VAGUE)
    if kind == 4:
        clauses = right_clauses(task) if rng.random() < 0.5 else sample_clauses(rng, task)
        return shuffled(rng, write(rng, clauses))
    return gibberish(rng, rng.randint(3, 40))
