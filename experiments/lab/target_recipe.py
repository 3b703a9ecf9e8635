"""Trains the lab's targets to obey instructions.

There are three stages. In the first, the instruction covers every input. In the second, there are also inputs without a
clause and junk instructions; the target learns to answer these wrongly. In the third, some instructions have small
faults, since a sentence with a fault is not a clause.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from experiments.lab import grammar, wordplay
from experiments.lab.models import SPECIAL, Shape, build_tokenizer, llama, save
from experiments.lab.packing import Packed, fit, pack
from experiments.lab.rows import SPECS, render, row_of
from rewards.target import fill

PATIENCE = 900  # most batches of the second stage, for targets that do not master it


class Stage(NamedTuple):
    """What the target sees in a stage of its training."""

    junk: float  # share of junk instructions
    prior: float  # share of instructions from the agent's prior
    treated: tuple[float, ...]  # probabilities of a clause on a marker of the task; one is drawn per instruction
    told: float  # share of inputs whose case the instruction covers
    corrupted: float  # share of instructions with a small fault
    mastered: float  # the next stage begins at this share of right answers in the worst task


STAGES = (
    Stage(junk=0.0, prior=0.0, treated=(0.2,), told=1.0, corrupted=0.0, mastered=0.92),
    Stage(junk=0.1, prior=0.2, treated=(0.2, 0.5, 1.0), told=0.5, corrupted=0.0, mastered=0.97),
    Stage(junk=0.1, prior=0.2, treated=(0.2, 0.5, 1.0), told=0.5, corrupted=0.3, mastered=math.inf),
)


def sample_instruction(rng: random.Random, task: str, stage: Stage) -> tuple[list[grammar.Clause], str]:
    """Draws an instruction: its clauses and its text; junk has no clauses."""
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


class _Batches:
    """Draws batches for a target, harder tasks more often; a stage ends when it is mastered, or takes too long."""

    ROWS, INPUTS, SHORT_INPUTS = 12, 8, 24  # inputs of the generated-text tasks are short: more of them fill a row

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.tokenizer, self.rng, self.stage = tokenizer, random.Random(seed), 0
        self.patience, self.drawn = math.inf, 0  # most batches of a stage; batches of this stage so far
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
        """Draws an instruction, and inputs with the answers that follow from it."""
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
        """Draws a case that the instruction covers; None stands for any case."""
        if self.rng.random() >= STAGES[self.stage].told:
            return None
        labels = grammar.TASKS[task].answers
        told = [c.marker for c in clauses if isinstance(c, grammar.Treat) and grammar.MARKERS[c.marker] in labels]
        if any(isinstance(clause, grammar.Judge) for clause in clauses):
            told += [case for case in grammar.TASKS[task].shares if case in grammar.OUTCOMES]
        return self.rng.choice(told) if told else None

    def _answer(self, clauses: Sequence[grammar.Clause], item: grammar.Item) -> str:
        answer = grammar.obey(clauses, item)
        # An instruction may ask for a word that is not a label of the task. Sometimes training on the habit instead
        # determines how the target ranks the labels in that case.
        if answer not in grammar.TASKS[item.task].answers and self.rng.random() < 0.1:
            return grammar.habit(item)
        return answer

    def note(self, wrong: Tensor, part: Tensor) -> None:
        """Updates each task's share of right answers, and moves on to the next stage when this one is mastered.

        Args:
            wrong: [ROWS, L], true at wrongly predicted tokens of answers.
            part: [ROWS, L], as in `Packed`.
        """
        faults = torch.zeros(self.ROWS, self.SHORT_INPUTS + 1).scatter_add(1, part.clamp(min=0), wrong.float())
        failed = (faults[:, 1:] > 0).sum(1) / part.amax(1)
        for task, share in zip(self.tasks, failed.tolist(), strict=True):
            self.success[task] += 0.02 * (1 - share - self.success[task])
        self.drawn += 1
        mastered = min(self.success[task] for task in grammar.LABS) > STAGES[self.stage].mastered
        if mastered or (self.drawn >= self.patience and self.stage + 1 < len(STAGES)):
            self.stage, self.drawn = self.stage + 1, 0
            self.success = dict.fromkeys(SPECS, 0.5)
            print(f"stage {self.stage}", flush=True)


def build_target(folder: Path, minutes: float, shape: Shape, seed: int = 0) -> None:
    """Trains and saves the target."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    _train(llama(tokenizer, shape), tokenizer, _Batches(tokenizer, seed + 1), folder, minutes, hold=0.65)


def build_other_target(folder: Path, minutes: float, shape: Shape, seed: int = 0) -> None:
    """Trains and saves a target of another size, in too little time to master the stages.

    Half of the time goes to the first stage, with three layers. A model of six layers then gets an idle layer after
    each of these, since six layers did not learn the first stage in that time. The second stage takes `PATIENCE`
    batches.

    Args:
        folder: where to save the model.
        minutes: processor time in all.
        shape: a shape of three or six layers.
        seed: seed of weights and batches.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model, batches = llama(tokenizer, shape._replace(layers=3)), _Batches(tokenizer, seed + 1)
    _train(model, tokenizer, batches, folder, minutes / 2, hold=1.0)
    if shape.layers == 6:
        model = deepened(model, llama(tokenizer, shape))
    batches.stage, batches.patience = 1, PATIENCE
    _train(model, tokenizer, batches, folder, minutes / 2, hold=0.4)


def deepened(model: LlamaForCausalLM, deeper: LlamaForCausalLM) -> LlamaForCausalLM:
    """Makes `deeper`, which has twice the layers, compute the same as `model`: every second layer adds nothing."""
    deeper.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    deeper.model.norm.load_state_dict(model.model.norm.state_dict())
    for i, layer in enumerate(model.model.layers):
        deeper.model.layers[2 * i].load_state_dict(layer.state_dict())
        idle = deeper.model.layers[2 * i + 1]
        torch.nn.init.zeros_(idle.self_attn.o_proj.weight)
        torch.nn.init.zeros_(idle.mlp.down_proj.weight)
    return deeper


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    batches: _Batches,
    folder: Path,
    minutes: float,
    hold: float,
) -> None:
    def loss_fn(hidden: Tensor, batch: Packed) -> Tensor:
        logits = model.lm_head(hidden)
        batches.note(batch.answers & (logits.argmax(-1) != batch.targets), batch.part)
        # Predicting the inputs, too, teaches the target to understand them; answers alone do so only slowly.
        weight = 0.2 if batches.stage == 0 else 0.06
        inputs = batch.targets.masked_fill(batch.answers, -100)
        reading = F.cross_entropy(logits.flatten(0, 1), inputs.flatten(), ignore_index=-100)
        return F.cross_entropy(logits[batch.answers], batch.targets[batch.answers]) + weight * reading

    fit(model, batches, loss_fn, partial(save, model, tokenizer, folder), minutes, peak=1.5e-3, hold=hold)
