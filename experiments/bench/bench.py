"""Benchmarks: how fast scoring, sampling and updating are, against the plain way of doing the same.

    python -m experiments.bench                         all parts but `real`, in about 11 minutes; writes bench.json
    python -m experiments.bench --only scoring          one part: scoring, sampling, update, iteration or real

The part `real` (`make bench REAL=1`) takes the models in models/smollm2 and models/gemma3-270m, and some ten minutes
more. The others take random weights, since only shapes matter here.

Ratios depend on the machine, above all on its libraries for matrix products. The ways to do a piece of work take
turns, round after round. Times are medians, and ratios are medians of the ratios within a round, so that a slow moment
of the machine affects all ways alike. Scoring and updating are timed only after all ways have given the same numbers;
not so the scoring of `real`, whose ways compute in different dtypes.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from appo.config import APPOConfig, SamplingConfig
from appo.lm import adapter
from appo.lm.ends import Ends
from appo.lm.model import CausalLM
from appo.policy import Policy
from appo.rollout import Batch, Query, Rollout, Scored
from appo.trainer import APPOTrainer
from experiments.bench import real
from experiments.bench.memory import transient
from experiments.bench.plain import as_plain, bare_products, plain_loss, plain_sample, plain_scores, plain_update
from experiments.bench.real import Real
from experiments.config import MAX_THREADS, RunConfig
from experiments.config.extras import installed
from experiments.lab import grammar
from experiments.run.files import write_whole
from experiments.run.models import find_device, load_model
from experiments.terminal.command import Parser, UsageError, in_order, new_file
from rewards.local import LocalTarget
from rewards.target import grid

Work = Callable[[], Any]


class Shape(NamedTuple):
    """A Llama: vocabulary, width, layers."""

    vocabulary: int
    hidden: int
    layers: int


SHAPES = {
    "tiny": Shape(4096, 192, 5),
    "small": Shape(32_000, 512, 8),
    "big head": Shape(256_000, 256, 2),
}
PROMPT, INPUT, QUERY, RESPONSE = 70, 80, 256, 64  # tokens
UPDATES = (  # shape, K, rank of an adapter (0: all weights are trained), gradient checkpointing
    *(("tiny", 4, 0, False), ("tiny", 8, 0, False), ("small", 4, 0, False), ("big head", 1, 0, False)),
    *(("tiny", 4, 16, False), ("small", 4, 16, False), ("big head", 1, 16, False)),
    *(("tiny", 4, 16, True), ("small", 4, 16, True), ("big head", 1, 16, True)),
)
WORDS = ("yes", "maybe", "no")
TEMPLATE = "{prompt} Input : {input} Output :"


class Row(NamedTuple):
    """One comparison of two ways to do a piece of work, in seconds or in bytes of memory."""

    work: str
    against: str
    theirs: float
    ours: float
    ratio: float
    unit: str = "s"

    def __str__(self) -> str:
        theirs, ours = (f"{x / 2**20:7.0f} MB" if self.unit == "B" else f"{x:8.3f} s" for x in (self.theirs, self.ours))
        return f"{self.work:44} {self.against:34} {theirs} {ours} {self.ratio:6.2f}x"


class Bench:
    """The parts of the benchmark; each part yields its rows as it measures them.

    Args:
        budget: seconds for the rounds of one piece of work, which gets at least two rounds.
        device: device of the models, "cpu" or "cuda".
        dtype: dtype in which agents compute, and also targets, except in the part that compares two dtypes.
    """

    def __init__(self, budget: float, device: str, dtype: torch.dtype) -> None:
        self.budget, self.device, self.dtype = budget, device, dtype
        self.rng = random.Random(0)
        self.tokenizer = load_model(RunConfig(device="cpu"), "target").tokenizer

    def timed(self, work: str, ways: Mapping[str, Work], pairs: Sequence[tuple[str, str]]) -> Iterator[Row]:
        """Runs all ways in turn until the budget is spent, at least twice; yields a row for each pair (theirs, ours).

        A round before, which is not timed, measures the memory of the first pair.
        """
        size = {name: transient(way, self.device) for name, way in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        until = time.perf_counter() + self.budget
        while len(seconds[next(iter(ways))]) < 2 or time.perf_counter() < until:
            for name, way in ways.items():
                began = self._now()
                way()
                seconds[name].append(self._now() - began)
        for theirs, ours in pairs:
            ratio = statistics.median(a / b for a, b in zip(seconds[theirs], seconds[ours], strict=True))
            label = theirs if ours == "ours" else f"{theirs} ({ours})"
            yield Row(work, label, statistics.median(seconds[theirs]), statistics.median(seconds[ours]), ratio)
        theirs, ours = pairs[0]
        yield Row(work, theirs, size[theirs], size[ours], size[theirs] / max(1, size[ours]), "B")

    def _now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    # -- scoring -------------------------------------------------------------------------------------------------

    def scoring(self) -> Iterator[Row]:
        """Scores K prompts on B inputs: prompt by prompt, in batches of four or whole batches, against our way."""
        for name, prompts, inputs, prompt, length in (
            ("tiny", 4, 16, PROMPT, INPUT),
            ("tiny", 16, 16, PROMPT, INPUT),
            ("tiny", 4, 64, PROMPT, INPUT),
            ("tiny", 4, 16, 3 * PROMPT, INPUT),
            ("tiny", 4, 16, PROMPT, 3 * INPUT),
            ("small", 4, 8, PROMPT, INPUT),
            ("big head", 4, 8, PROMPT, INPUT),
        ):
            yield from self._scoring(name, prompts, inputs, prompt, length)

    def _scoring(self, name: str, count: int, size: int, prompt: int, length: int) -> Iterator[Row]:
        prompts, inputs = self._texts(count, prompt), self._texts(size, length)
        plain, exact, half = (self._target(name, d) for d in (torch.float32, torch.float32, torch.bfloat16))
        as_plain(plain.lm)

        def ours(target: LocalTarget) -> Tensor:
            return target.class_logits(grid(prompts, inputs)).view(len(prompts), len(inputs), -1)

        same(plain_scores(plain, prompts, inputs, 4).log_softmax(-1), ours(exact).log_softmax(-1))
        ways = {
            "batches of 4": lambda: plain_scores(plain, prompts, inputs, 4),
            "bare matrix products": bare_products(exact, prompts, inputs),
            "ours": lambda: ours(exact),
            "ours in bfloat16": lambda: ours(half),
        }
        if (count, size) == (4, 16):
            ways["whole batches"] = lambda: plain_scores(plain, prompts, inputs, size)
        pairs = [(theirs, "ours") for theirs in ways if "ours" not in theirs] + [("batches of 4", "ours in bfloat16")]
        work = f"scoring {name}, K {count}, B {size}, {prompt} + {length} tokens"
        yield from self.timed(work, ways, pairs)

    def _target(self, name: str, dtype: torch.dtype) -> LocalTarget:
        model = build(SHAPES[name], dtype, self.device).requires_grad_(False)
        return LocalTarget(CausalLM(model, self.tokenizer), TEMPLATE, WORDS)

    def _texts(self, count: int, length: int) -> list[str]:
        """Returns `count` texts of about `length` tokens."""
        texts = []
        for _ in range(count):
            words = grammar.gibberish(self.rng, 3 * length)
            ids = self.tokenizer(words, add_special_tokens=False)["input_ids"]
            texts.append(self.tokenizer.decode(ids[: self.rng.randint(3 * length // 4, 5 * length // 4)]))
        return texts

    # -- sampling and updating -----------------------------------------------------------------------------------

    def sampling(self) -> Iterator[Row]:
        """Samples K responses to one query: `generate` and a pass for log-probabilities and values, against our way."""
        for name, count in (("tiny", 4), ("tiny", 8), ("small", 4)):
            plain, ours, query = self._plain_trainer(name).policy, self._trainer(name).policy, self._query()
            ways = {
                "generate and a pass": lambda p=plain, q=query, k=count: plain_sample(p, q, k, RESPONSE),
                "ours": lambda p=ours, q=query, k=count: p.sample([q], copies=k),
            }
            yield from self.timed(f"sampling {name}, K {count}", ways, [("generate and a pass", "ours")])

    def update(self) -> Iterator[Row]:
        """Runs four PPO epochs on K responses, after the passes for the reference's log-probabilities."""
        for name, count, rank, low in UPDATES:
            if rank and not installed("peft"):
                continue
            plain, ours = self._plain_trainer(name, rank, low), self._trainer(name, rank, low)
            work = f"{'LoRA ' if rank else ''}update {name}, K {count}{', checkpointing' if low else ''}"
            also_ppo = (name, count, rank) == ("tiny", 4, 0)
            yield from self._update(work, plain, ours, ours.policy.sample([self._query()], copies=count), also_ppo)

    def _update(
        self, work: str, plain: APPOTrainer, ours: APPOTrainer, rollout: Rollout, also_ppo: bool = False
    ) -> Iterator[Row]:
        batch = as_batch(rollout)
        same(gradients(plain, plain_loss(plain, batch)[0]), gradients(ours, ours.updater.loss(batch)[0]))
        ways = {
            "TRL's passes": lambda: plain_update(plain, batch, passes=2),
            "ours": lambda: our_update(ours, rollout),
        }
        if also_ppo:
            ways["plain PPO"] = lambda: plain_update(plain, batch, passes=1)
        yield from self.timed(work, ways, [(theirs, "ours") for theirs in ways if theirs != "ours"])

    def iteration(self) -> Iterator[Row]:
        """Samples, scores and updates: everything the plain way, against everything our way."""
        for name, count, size in (("tiny", 4, 16), ("tiny", 8, 32)):
            prompts, inputs, query = self._texts(count, PROMPT), self._texts(size, INPUT), self._query()
            plain, ours = self._plain_trainer(name), self._trainer(name)
            answering, target = self._target(name, self.dtype), self._target(name, self.dtype)
            as_plain(answering.lm)

            def published(t=plain, q=query, k=count, m=answering, p=prompts, i=inputs) -> None:  # type: ignore[no-untyped-def]
                rollout = plain_sample(t.policy, q, k, RESPONSE)
                plain_scores(m, p, i, 4)
                plain_update(t, as_batch(rollout), passes=2)

            def appo(t=ours, q=query, k=count, m=target, p=prompts, i=inputs) -> None:  # type: ignore[no-untyped-def]
                rollout = t.policy.sample([q], copies=k)
                m.class_logits(grid(p, i))
                our_update(t, rollout)

            ways = {"all the plain way": published, "ours": appo}
            yield from self.timed(f"iteration {name}, K {count}, B {size}", ways, [("all the plain way", "ours")])

    def real(self) -> Iterator[Row]:
        """An iteration of SmolLM2-135M with Gemma-3-270M, piece by piece; decoding steps; answers."""
        model, pieces = Real(), dict[str, Row]()
        for row in self._pieces(model):
            yield row
            pieces.setdefault(row.work, row)  # the first row of each is against the plain way
        plain, appo = sum(row.theirs for row in pieces.values()), sum(row.ours for row in pieces.values())
        yield Row("the above together", "all the plain way", plain, appo, plain / appo)
        rounds = list(model.rounds(self.budget))
        for name in [way for way in rounds[0] if way != "ours"]:
            theirs, ours = ([seconds[way] for seconds in rounds] for way in (name, "ours"))
            ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
            yield Row(f"a step of {real.COUNT} rows", name, statistics.median(theirs), statistics.median(ours), ratio)
        if not real.has_llama_cpp():
            print(f"llama.cpp is left out: it needs the package xllamacpp and {real.GGUF}", file=sys.stderr)
        if real.has_answers():
            ways = real.Answers().ways()
            yield from self.timed(f"answers of {real.NAME_OF_ANSWERS}", ways, [(next(iter(ways)), "ours")])
        else:
            print(f"scoring and answers are left out: there is no model in {real.ANSWERING}", file=sys.stderr)

    def _pieces(self, model: Real) -> Iterator[Row]:
        yield from self.timed(f"sampling {real.NAME}", model.ways(), [("generate and a pass", "ours")])
        if real.has_answers():
            ways = real.scoring()
            *others, ours = ways
            yield from self.timed(f"scoring {real.NAME_OF_SCORING}", ways, [(theirs, ours) for theirs in others])
        plain, trained = (APPOTrainer(p, APPOConfig(learning_rate=1e-6)) for p in (model.plain, model.ours))
        rollout = model.ours.sample([model.query], copies=real.COUNT)
        yield from self._update(f"update {real.NAME}", plain, trained, rollout)

    def _trainer(self, name: str, rank: int = 0, checkpointing: bool = False) -> APPOTrainer:
        sampling = SamplingConfig(RESPONSE, 1.0, nonempty=False, one_line=False)
        model = build(SHAPES[name], torch.float32, self.device)
        if rank:
            adapter.add(model, rank)
        lm = CausalLM(model, self.tokenizer, compute_dtype=self.dtype, gradient_checkpointing=checkpointing)
        policy = Policy(lm, sampling)
        policy.ends = Ends((), (), SHAPES[name].vocabulary, model.device, False, False)  # so that all have full length
        return APPOTrainer(policy, APPOConfig(learning_rate=1e-6, ppo_epochs=4))  # TRL's epochs

    def _plain_trainer(self, name: str, rank: int = 0, checkpointing: bool = False) -> APPOTrainer:
        trainer = self._trainer(name, rank, checkpointing)
        as_plain(trainer.policy.lm)
        trainer.policy.model.train(checkpointing)  # as Hugging Face models want it for checkpointing; no dropout here
        return trainer

    def _query(self) -> Query:
        return Query(tuple(self.rng.randrange(4, 1000) for _ in range(QUERY)))


def build(shape: Shape, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """Builds a model with random weights, which are the same in every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=8 * shape.hidden // 3 // 32 * 32,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=None,
        dtype=dtype,
    )
    with torch.device(device):
        model: LlamaForCausalLM = LlamaForCausalLM._from_config(config)
    return model.eval()


def as_batch(rollout: Rollout) -> Batch:
    """Returns the rollout as a minibatch with made-up advantages."""
    advantages = torch.linspace(-1, 1, rollout.mask.numel(), device=rollout.mask.device).view(rollout.mask.shape)
    scored = Scored.of(rollout, advantages[:, 0], rollout.logprobs)
    return Batch(**vars(scored), advantages=advantages, returns=advantages + rollout.values)


def our_update(trainer: APPOTrainer, rollout: Rollout) -> None:
    """What `APPOTrainer.step` does after sampling and scoring."""
    anchor = trainer.anchor.logprobs(rollout)
    trainer.buffer.add(rollout, torch.linspace(0, 1, len(rollout)), anchor)
    trainer.update()


def gradients(trainer: APPOTrainer, loss: Tensor) -> Tensor:
    """Returns all gradients of the loss as one flat vector."""
    trainer.updater.optimizer.zero_grad()
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None])
    trainer.updater.optimizer.zero_grad()
    return found


def same(theirs: Tensor, ours: Tensor) -> None:
    """Raises an error if two ways of computing something differ by more than rounding."""
    error = ((theirs - ours).abs().max() / theirs.abs().max()).item()
    if error > (1e-4 if theirs.dtype == torch.float32 else 0.05):
        raise RuntimeError(f"the compared ways give different numbers: they differ by {error:.1e} of the largest")


@in_order
def main(argv: Sequence[str]) -> int:
    """Runs the parts, prints a table as it goes, and writes bench.json."""
    parts = ("scoring", "sampling", "update", "iteration")  # by default
    parser = Parser("python -m experiments.bench", __doc__)
    parser.add_argument(
        "--only", choices=(*parts, "real"), action="append", help="one part; may be repeated (default: all but real)"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="for each piece of work (default: 6)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto, a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    parser.add_argument("--out", type=new_file, default="bench.json", help="file to write (default: bench.json)")
    options = parser.parse_args(argv)
    device = find_device(options.device).type
    if not 1 <= options.threads <= MAX_THREADS:
        raise UsageError(f"--threads is {options.threads}; expected 1 to {MAX_THREADS}")
    torch.set_num_threads(options.threads)
    bench = Bench(options.seconds, device, getattr(torch, options.dtype))
    about = {
        "date": str(date.today()),
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "torch": torch.__version__,
        "threads": options.threads,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'work':44} {'against':34} {'theirs':>10} {'ours':>10} {'ratio':>7}", flush=True)
    rows: list[Row] = []
    for part in options.only or parts:
        for row in getattr(bench, part)():
            print(row, flush=True)
            rows.append(row)
    found = {"about": about, "rows": [row._asdict() for row in rows]}
    write_whole(options.out, json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
