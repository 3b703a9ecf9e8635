"""Builds the lab from nothing: data, tokenizers, the target that obeys and the agent that writes.

    python -m experiments.lab.recipe            everything, about 80 minutes on two cores
    python -m experiments.lab.recipe data       only the rows (seconds)

Both models are small Llamas trained from scratch on `grammar` and `wordplay`. In both trainings several continuations
share one prefix (inputs after an instruction, instructions after a meta-prompt): a block mask lets each of them see
the prefix and itself only, which halves the work and gives every instruction several answers to learn from.

The target is taught in three stages: first every input is one that its instruction speaks of; when that is mastered,
inputs without a clause of their own and instructions that are junk are mixed in, which call for the wrong answer; in
the end instructions with small faults, since a sentence with a fault is no clause. The agent learns first to read what
a single input asks for, then to write instructions of all kinds, and at last to go by its habit more often than not.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from experiments.lab import grammar, wordplay
from experiments.lab.packing import Packed, fit, pack
from experiments.terminal.command import Parser, in_order
from rewards.target import fill
from tasks.catalogue import load_spec
from tasks.meta_prompt import MetaPrompt, meta_prompt, rewrite_prompt
from tasks.spec import Example

LAB_DIR = Path(__file__).parent
TRAIN_ROWS, TEST_ROWS = 400, 600
HABIT = "action"  # what the untrained agent mostly judges by where an input says what to judge
PAIRS = 5  # in the meta-prompts that the agent learns from, as in runs
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TARGET_MINUTES, AGENT_MINUTES = 75.0, 20.0
SPECS = {task: load_spec(task) for task in (*grammar.TASKS, *wordplay.TASKS)}


def row_of(item: grammar.Item) -> dict[str, Any]:
    """The item as a row of the real task's data."""
    spec = SPECS[item.task]
    return item.fields | {spec.label[0]: list(spec.verbalizer)[spec.words.index(item.answer)]}


def render(task: str, row: dict[str, Any]) -> Example:
    """A row as the tasks layer renders it."""
    rendered = SPECS[task].example(row, "the lab")
    assert rendered is not None
    return rendered


def sample_example(rng: random.Random, task: str) -> Example:
    """A random example of any of the lab's tasks."""
    if task in wordplay.TASKS:
        return render(task, wordplay.sample_row(rng, task))
    return render(task, row_of(grammar.sample_item(rng, task)))


# -- data --------------------------------------------------------------------------------------------------------


def write_data(folder: Path, seed: int = 7) -> None:
    """train.jsonl, test.jsonl and manual_prompt.txt of every task: distinct inputs, the real tasks' columns."""
    for task in SPECS:
        rng = random.Random(f"{seed}-{task}")
        rows = _grammar_rows(rng, task) if task in grammar.TASKS else _wordplay_rows(rng, task)
        train = min(TRAIN_ROWS, len(rows) * 2 // 3)  # inputs of a few hundred words run out
        (folder / task).mkdir(parents=True, exist_ok=True)
        for name, part in (("train", rows[:train]), ("test", rows[train:])):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / task / f"{name}.jsonl").write_text(text, encoding="utf-8")
        (folder / task / "manual_prompt.txt").write_text(_manual_prompt(task) + "\n", encoding="utf-8")


def _manual_prompt(task: str) -> str:
    if task in wordplay.TASKS:
        return "Do the task."
    return " ".join(clause.wordings()[0] for clause in grammar.manual_clauses(task))


def _grammar_rows(rng: random.Random, task: str) -> list[dict[str, Any]]:
    shares = grammar.TASKS[task].shares
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < TRAIN_ROWS + TEST_ROWS:
        item = grammar.sample_item(rng, task, rng.choices(list(shares), list(shares.values()))[0])
        rows.setdefault(render(task, row_of(item)).input, row_of(item))
    return list(rows.values())


def _wordplay_rows(rng: random.Random, task: str) -> list[dict[str, Any]]:
    if task in wordplay.INPUTS:
        texts = rng.sample(wordplay.INPUTS[task], len(wordplay.INPUTS[task]))
        return [wordplay.sample_row(rng, task, text) for text in texts]
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < TRAIN_ROWS + TEST_ROWS:
        row = wordplay.sample_row(rng, task)
        rows.setdefault(render(task, row).input, row)
    return list(rows.values())


def build_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the lab's own text, with <s> put before every text."""
    rng = random.Random(seed)
    texts = []
    for _ in range(6_000):
        task = rng.choice(list(SPECS))
        (request, opening), _ = _sample_query(rng, task)
        texts.append(f"{request}\n{opening} {_sample_prior(rng, task)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def _llama(tokenizer: PreTrainedTokenizerBase, hidden: int, intermediate: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **{name.replace("token", "token_id"): tokenizer.convert_tokens_to_ids(t) for name, t in SPECIAL.items()},
    )
    return LlamaForCausalLM(config)


# -- target ------------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """What the target sees: shares of junk and of the agent's prior, how long other instructions are, which inputs."""

    junk: float
    prior: float
    treated: tuple[float, ...]  # probabilities, one drawn for each instruction, of a clause on a marker of the task
    told: float  # share of inputs whose case the instruction speaks of
    corrupted: float  # share of instructions with a small fault
    mastered: float  # share of right answers, in the worst task, at which the next stage begins


STAGES = (
    Stage(junk=0.0, prior=0.0, treated=(0.2,), told=1.0, corrupted=0.0, mastered=0.92),
    Stage(junk=0.1, prior=0.2, treated=(0.2, 0.5, 1.0), told=0.5, corrupted=0.0, mastered=0.97),
    Stage(junk=0.1, prior=0.2, treated=(0.2, 0.5, 1.0), told=0.5, corrupted=0.3, mastered=math.inf),
)


def sample_instruction(rng: random.Random, task: str, stage: Stage) -> tuple[list[grammar.Clause], str]:
    """Clauses and their text; junk has no clauses."""
    kind = rng.random()
    if kind < stage.junk:
        return [], grammar.sample_junk(rng, task)
    clauses = grammar.sample_clauses(rng, task) if kind < stage.junk + stage.prior else _clauses(rng, task, stage)
    text = grammar.write(rng, clauses)
    if rng.random() < stage.corrupted:
        text = grammar.corrupted(rng, text)
        clauses = grammar.parse(text)
    return clauses, text


def _clauses(rng: random.Random, task: str, stage: Stage) -> list[grammar.Clause]:
    clauses: list[grammar.Clause] = []
    share = rng.choice(stage.treated)
    for marker in rng.sample(list(grammar.MARKERS), len(grammar.MARKERS)):
        if rng.random() < (share if marker in grammar.TASKS[task].markers else 0.1):
            answer = grammar.MARKERS[marker] if rng.random() < 0.4 else rng.choice(grammar.ANSWERS)
            clauses.append(grammar.Treat(marker, answer))
    if not clauses or rng.random() < 0.9:
        criteria = list(grammar.TRAITS if task == "sst2" else grammar.PAIR_SLOTS)
        own = grammar.TASKS[task].criterion
        criterion = own if own and rng.random() < 0.2 else rng.choice(criteria)
        clauses.insert(rng.choice((0, 0, rng.randint(0, len(clauses)))), grammar.Judge(criterion))
    return clauses


class _TargetBatches:
    """Draws batches for the target, harder tasks more often, and moves on to the next stage when one is mastered."""

    ROWS, INPUTS, SHORT_INPUTS = 12, 8, 24  # inputs of the generated-text tasks are short: more of them fill a row

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.tokenizer, self.rng, self.stage = tokenizer, random.Random(seed), 0
        self.success = dict.fromkeys(SPECS, 0.5)
        self.tasks: list[str] = []

    def __call__(self) -> Packed:
        weights = [1.08 - success for success in self.success.values()]
        self.tasks = self.rng.choices(list(SPECS), weights, k=self.ROWS)
        prefixes, continuations, answers = [], [], []
        for task in self.tasks:
            prefix, pairs = self._wordplay(task) if task in wordplay.TASKS else self._grammar(task)
            prefixes.append(prefix)
            seen, said = (
                self.tokenizer(texts, add_special_tokens=False)["input_ids"]
                for texts in zip(
                    *((fill(SPECS[task].template, "", text), f" {answer}") for text, answer in pairs), strict=True
                )
            )
            continuations.append([before + after for before, after in zip(seen, said, strict=True)])
            answers.append(list(map(len, said)))
        return pack(self.tokenizer(prefixes)["input_ids"], continuations, answers)

    def _grammar(self, task: str) -> tuple[str, list[tuple[str, str]]]:
        """An instruction, and inputs with what it makes of them."""
        clauses, text = sample_instruction(self.rng, task, STAGES[self.stage])
        items = [grammar.sample_item(self.rng, task, self._case(task, clauses)) for _ in range(self.INPUTS)]
        return text, [(render(task, row_of(item)).input, self._answer(clauses, item)) for item in items]

    def _wordplay(self, task: str) -> tuple[str, list[tuple[str, str]]]:
        told = self.stage == 0
        text = self.rng.choice(wordplay.wordings(task)) if told else wordplay.sample_instruction(self.rng, task)
        if self.rng.random() < STAGES[self.stage].corrupted:
            text = grammar.corrupted(self.rng, text)
        short = SPECS[task].kind == "text"
        rows = [wordplay.sample_row(self.rng, task) for _ in range(self.SHORT_INPUTS if short else self.INPUTS)]
        end = SPECIAL["eos_token"] if short else ""
        return text, [(render(task, row).input, wordplay.answer(text, task, row) + end) for row in rows]

    def _case(self, task: str, clauses: Sequence[grammar.Clause]) -> str | None:
        """A case that the instruction speaks of, or any."""
        if self.rng.random() >= STAGES[self.stage].told:
            return None
        labels = grammar.TASKS[task].answers
        told = [c.marker for c in clauses if isinstance(c, grammar.Treat) and grammar.MARKERS[c.marker] in labels]
        if any(isinstance(clause, grammar.Judge) for clause in clauses):
            told += [case for case in grammar.TASKS[task].shares if case in grammar.OUTCOMES]
        return self.rng.choice(told) if told else None

    def _answer(self, clauses: Sequence[grammar.Clause], item: grammar.Item) -> str:
        answer = grammar.obey(clauses, item)
        # Told to say a word that is no label of the task, the target sometimes falls back on its habit, so that
        # what it thinks of the labels then is settled too.
        if answer not in grammar.TASKS[item.task].answers and self.rng.random() < 0.1:
            return grammar.habit(item)
        return answer

    def note(self, wrong: Tensor, part: Tensor) -> None:
        """Takes in how many answers were right.

        Args:
            wrong: [ROWS, L], 1 where a token of an answer would have been another.
            part: [ROWS, L], of `Packed`.
        """
        faults = torch.zeros(self.ROWS, self.SHORT_INPUTS + 1).scatter_add(1, part.clamp(min=0), wrong.float())
        failed = (faults[:, 1:] > 0).sum(1) / part.amax(1)
        for task, share in zip(self.tasks, failed.tolist(), strict=True):
            self.success[task] += 0.02 * (1 - share - self.success[task])
        if min(self.success[task] for task in grammar.LABS) > STAGES[self.stage].mastered:
            self.stage += 1
            self.success = dict.fromkeys(SPECS, 0.5)
            print(f"stage {self.stage}", flush=True)


def build_target(folder: Path, minutes: float = TARGET_MINUTES, seed: int = 0) -> None:
    """Trains and saves the target."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = _llama(tokenizer, hidden=128, intermediate=320, layers=4)
    batches = _TargetBatches(tokenizer, seed + 1)

    def loss_fn(hidden: Tensor, batch: Packed) -> Tensor:
        logits = model.lm_head(hidden)
        batches.note(batch.answers & (logits.argmax(-1) != batch.targets), batch.part)
        # Predicting the inputs too helps to understand them, which the answers alone teach only slowly.
        weight = 0.2 if batches.stage == 0 else 0.06
        inputs = batch.targets.masked_fill(batch.answers, -100)
        reading = F.cross_entropy(logits.flatten(0, 1), inputs.flatten(), ignore_index=-100)
        return F.cross_entropy(logits[batch.answers], batch.targets[batch.answers]) + weight * reading

    fit(model, batches, loss_fn, partial(_save, model, tokenizer, folder), minutes, peak=1.5e-3, hold=0.65)


# -- agent -------------------------------------------------------------------------------------------------------


def _sample_query(rng: random.Random, task: str) -> tuple[MetaPrompt, str | None]:
    """A meta-prompt, often one for a single input, and what such an input of the mixed task hints at."""
    pairs = [sample_example(rng, task) for _ in range(PAIRS if rng.random() < 0.4 else rng.randint(1, PAIRS))]
    if rng.random() < (0.1 if task == grammar.MIXED else 0.6):
        return meta_prompt(pairs), None
    manual = _manual_prompt(task) if rng.random() < 0.3 else ""
    if task in wordplay.TASKS:
        return rewrite_prompt(pairs, sample_example(rng, task).input, manual), None
    item = grammar.sample_item(rng, task)
    query = rewrite_prompt(pairs, render(task, row_of(item)).input, manual)
    return query, item.criterion if task == grammar.MIXED else None


def _sample_prior(rng: random.Random, task: str, hint: str | None = None, taken: float = 1.0) -> str:
    """An instruction; shown a hint, the agent takes it so often, or follows its habit, or neither."""
    if task in wordplay.TASKS:
        return wordplay.sample_prior(rng, task)
    weights = (taken, 0.8 * (1 - taken), 0.2 * (1 - taken))
    return grammar.sample_prior(rng, task, rng.choices((hint, HABIT, None), weights)[0] if hint else None)


def build_agent(folder: Path, minutes: float = AGENT_MINUTES, seed: int = 0) -> None:
    """Trains and saves the agent: a writer of instructions behind meta-prompts, blind to which are right."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(seed + 5), build_tokenizer()
    model = _llama(tokenizer, hidden=96, intermediate=256, layers=4)

    def reading(rows: int = 16, instructions: int = 2) -> Iterator[tuple[MetaPrompt, list[str]]]:
        """Single inputs of the mixed task after a pair or two, and the clause alone that each of them asks for."""
        for _ in range(rows):
            pairs = [sample_example(rng, grammar.MIXED) for _ in range(rng.randint(0, 2))]
            item = grammar.sample_item(rng, grammar.MIXED)
            query = rewrite_prompt(pairs, render(grammar.MIXED, row_of(item)).input)
            yield query, rng.choices(grammar.Judge(item.criterion).wordings(), k=instructions)

    def writing(taken: float, rows: int = 8, instructions: int = 6) -> Iterator[tuple[MetaPrompt, list[str]]]:
        """Meta-prompts of all tasks, and instructions from the prior; a hint is taken so often."""
        for _ in range(rows):
            task = grammar.MIXED if rng.random() < 0.45 else rng.choice(list(SPECS))
            query, hint = _sample_query(rng, task)
            yield query, [_sample_prior(rng, task, hint, taken) for _ in range(instructions)]

    def packed(rows: Iterator[tuple[MetaPrompt, list[str]]]) -> Packed:
        queries, written = zip(*rows, strict=True)
        parts = [[f" {text}{SPECIAL['eos_token']}" for text in texts] for texts in written]
        return pack(
            tokenizer([f"{request}\n{opening}" for request, opening in queries])["input_ids"],
            [tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in parts],
        )

    def loss_fn(hidden: Tensor, batch: Packed) -> Tensor:
        written = batch.targets >= 0
        return F.cross_entropy(model.lm_head(hidden[written]), batch.targets[written])

    save = partial(_save, model, tokenizer, folder)
    # What a single input asks for is one word in thirty of an instruction: among all else it was not found in twenty
    # minutes, alone it is in one, and kept. In the end habit wins over it, so that tuning has something to find.
    fit(model, lambda: packed(reading()), loss_fn, save, minutes / 8, peak=2e-3, hold=1.0)
    fit(model, lambda: packed(writing(1.0)), loss_fn, save, minutes / 2, peak=2e-3, hold=0.3)
    fit(model, lambda: packed(writing(0.35)), loss_fn, save, 3 * minutes / 8, peak=1e-3, hold=0.0)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@in_order
def main(argv: Sequence[str]) -> int:
    """Builds the named parts, by default all of them; the two models at the same time."""
    parser = Parser(prog="python -m experiments.lab.recipe", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="data|target|agent", help="what to build (default: all)")
    parser.add_argument("--folder", type=Path, default=LAB_DIR, help="where to put it (default: the lab itself)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the training times, to try the recipe quickly")
    options = parser.parse_args(argv)
    parts = options.parts or ["data", "target", "agent"]
    if unknown := set(parts) - {"data", "target", "agent"}:
        parser.error(f"unknown part {min(unknown)!r}; parts are data, target, agent")
    if "data" in parts:
        write_data(options.folder / "data")
    builders = {"target": (build_target, TARGET_MINUTES), "agent": (build_agent, AGENT_MINUTES)}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for job in [
            pool.submit(build, options.folder / part, minutes * options.scale)
            for part, (build, minutes) in builders.items()
            if part in parts
        ]:
            job.result()
    return 0


if __name__ == "__main__":
    sys.exit(main())
