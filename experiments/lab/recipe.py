"""Builds the lab from scratch: data, tokenizers, targets that obey instructions, and agents that write them.

    python -m experiments.lab.recipe                 everything, about two hours on two cores
    python -m experiments.lab.recipe data            only the rows (seconds)
    python -m experiments.lab.recipe agent target    only the models that runs use by default, about 80 minutes

The lab has an agent and a target, and models of other sizes (`lab/small`, `lab/deep`) for grids. All are small Llamas,
trained from scratch on `grammar` and `wordplay`. In training, several continuations share one prefix: inputs follow an
instruction, instructions follow a meta-prompt. A block mask lets each continuation see only the prefix and itself. This
halves the work, and gives every instruction several answers to learn from.

`target_recipe` trains the targets. An agent first learns to read what a single input asks for, then to write
instructions of all kinds, and finally to follow its habit more often than the input.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.config import LAB_DIR
from experiments.lab import grammar
from experiments.lab.models import SPECIAL, Shape, build_tokenizer, llama, sample_prior, sample_query, save
from experiments.lab.packing import Packed, fit, pack
from experiments.lab.rows import SPECS, render, row_of, sample_example, write_data
from experiments.lab.target_recipe import build_other_target, build_target
from experiments.terminal.command import Parser, UsageError, in_order
from tasks.meta_prompt import MetaPrompt, rewrite_prompt


def build_agent(folder: Path, minutes: float, shape: Shape, seed: int = 0) -> None:
    """Trains and saves an agent, which writes instructions after meta-prompts without knowing which are right."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(seed + 5), build_tokenizer()
    model = llama(tokenizer, shape)

    def reading(rows: int = 16, instructions: int = 2) -> Iterator[tuple[MetaPrompt, list[str]]]:
        """Yields single inputs of the mixed task after up to two pairs, and only the clause that each asks for."""
        for _ in range(rows):
            pairs = [sample_example(rng, grammar.MIXED) for _ in range(rng.randint(0, 2))]
            item = grammar.sample_item(rng, grammar.MIXED)
            query = rewrite_prompt(pairs, render(grammar.MIXED, row_of(item)).input)
            yield query, rng.choices(grammar.Judge(item.criterion).wordings(), k=instructions)

    def writing(taken: float, rows: int = 8, instructions: int = 6) -> Iterator[tuple[MetaPrompt, list[str]]]:
        """Yields meta-prompts of all tasks, with instructions that follow a hint with probability `taken`."""
        for _ in range(rows):
            task = grammar.MIXED if rng.random() < 0.45 else rng.choice(list(SPECS))
            query, hint = sample_query(rng, task)
            yield query, [sample_prior(rng, task, hint, taken) for _ in range(instructions)]

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

    store = partial(save, model, tokenizer, folder)
    # The criterion that a single input asks for is one word in thirty of an instruction. From whole instructions the
    # agent did not learn it in twenty minutes; from this clause alone it does in one minute, and does not forget it.
    # The last stage makes its habit stronger than the input's criterion, so that tuning has something to improve.
    fit(model, lambda: packed(reading()), loss_fn, store, minutes / 8, peak=2e-3, hold=1.0)
    fit(model, lambda: packed(writing(1.0)), loss_fn, store, minutes / 2, peak=2e-3, hold=0.3)
    fit(model, lambda: packed(writing(0.35)), loss_fn, store, 3 * minutes / 8, peak=1e-3, hold=0.0)


MODELS = {  # folder -> the function that builds it, minutes of training, shape; the longest training first
    "target": (build_target, 75.0, Shape(128, 320, 4)),
    "deep/target": (build_other_target, 64.0, Shape(96, 256, 6)),
    "small/target": (build_other_target, 64.0, Shape(96, 256, 3)),
    "agent": (build_agent, 20.0, Shape(96, 256, 4)),
    "small/agent": (build_agent, 20.0, Shape(64, 160, 3)),
}


@in_order
def main(argv: Sequence[str]) -> int:
    """Builds the named parts, by default all of them, two models at a time."""
    known = ", ".join(["data", *MODELS])
    parser = Parser("python -m experiments.lab.recipe", __doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what to build, of {known} (default: all)")
    parser.add_argument("--folder", type=Path, default=LAB_DIR, help="where to put it (default: the lab itself)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on training times, to try the recipe quickly")
    options = parser.parse_args(argv)
    parts = options.parts or ["data", *MODELS]
    if unknown := set(parts) - {"data", *MODELS}:
        raise UsageError(f"unknown part {min(unknown)!r}; parts are {known}")
    if not options.scale > 0:
        raise UsageError(f"--scale is {options.scale}; expected above 0")
    if "data" in parts:
        write_data(options.folder / "data")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for job in [
            pool.submit(build, options.folder / part, minutes * options.scale, shape)
            for part, (build, minutes, shape) in MODELS.items()
            if part in parts
        ]:
            job.result()
    return 0


if __name__ == "__main__":
    sys.exit(main())
