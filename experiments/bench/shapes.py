"""Measures memory and time of an APPO iteration at the sizes of real models, with random weights, without a download.

    python -m experiments.bench.shapes 1b 7b
    python -m experiments.bench.shapes 7b --tokenizer models/smollm2 --data DIR --task sst2

Agent and target share one base in bfloat16, and a LoRA adapter is trained (`preset=lora`). The models write noise, so
the numbers say what an iteration costs, not what it finds. A short run warms up each shape; then each phase is timed
three times, and the median is shown.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PretrainedConfig, Qwen2Config

from appo.lm import adapter
from appo.lm.model import CausalLM
from appo.policy import Policy
from appo.rollout import Rollout
from appo.trainer import APPOTrainer
from experiments.config import LAB_DIR, RunConfig, build_config
from experiments.run.models import find_device, peak_memory
from experiments.terminal.command import Parser, in_order
from rewards.local import LocalTarget
from rewards.reward import ClassificationReward
from tasks.meta_prompt import meta_prompt
from tasks.sources import load_task

REPEATS = 3


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, tied: bool) -> LlamaConfig:
    sizes: dict[str, Any] = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": vocabulary}
    return LlamaConfig(**sizes, tie_word_embeddings=tied, max_position_embeddings=4096)


def shapes() -> dict[str, PretrainedConfig]:
    """Returns the configurations of some models by name."""
    qwen: dict[str, Any] = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28}
    qwen |= {"num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False}
    return {
        "tiny": _llama(128, 4, 4, 2, 512, 4096, tied=True),
        "1b": _llama(2048, 16, 32, 8, 8192, 128256, tied=True),  # Llama 3.2 1B
        "7b": Qwen2Config(**qwen, max_position_embeddings=4096),  # Qwen2.5 7B
        "8b": _llama(4096, 32, 32, 8, 14336, 128256, tied=False),  # Llama 3.1 8B
    }


class Measured(NamedTuple):
    """The cost of a phase.

    Attributes:
        seconds: median time.
        tokens: tokens that went through the model.
        gigabytes: peak memory, with the weights.
    """

    seconds: float
    tokens: int
    gigabytes: float


class Bench:
    """A model of some shape with random weights, as both agent and target of a run.

    Args:
        shape: the model's configuration.
        config: the run's configuration; its agent and target are ignored.
        tokenizer: folder of a tokenizer with no more tokens than the model.
    """

    def __init__(self, shape: PretrainedConfig, config: RunConfig, tokenizer: str) -> None:
        self.config, self.device = config, find_device(config.device)
        torch.manual_seed(0)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
        self.parameters = sum(weight.numel() for weight in model.parameters())
        adapter.add(model, config.lora.rank or 16)
        self.tokens = 0
        model.get_input_embeddings().register_forward_hook(self._count)
        words = AutoTokenizer.from_pretrained(tokenizer)
        agent = CausalLM(model, words, chat=False, compute_dtype=torch.bfloat16)
        self.policy = Policy(agent, config.sampling)
        data = load_task(config.task, config.data, config.examples.shots, config.seed, config.examples.test_limit)
        target = LocalTarget(agent.without_adapter(False), data.spec.template, data.words)
        self.reward = ClassificationReward(target, config.reward.accuracy_weight, config.reward.margin_weight)
        self.batch, self.validation = data.train[: config.examples.batch_size], data.validation
        self.queries = [self.policy.query(*meta_prompt(data.train[: config.examples.pairs]))]
        generator = torch.Generator(self.device).manual_seed(0)
        self.trainer = APPOTrainer(self.policy, config.appo, config.anchor, generator)

    def run(self, steps: int) -> None:
        """Makes a run: iterations, and a review of the anchor after every `anchor.period` of them."""

        def score(prompts: list[str]) -> list[float]:
            found: list[float] = self.reward(prompts, self.validation).metrics["accuracy"].tolist()
            return found

        for iteration in self.trainer.fit(self.queries, self._reward, steps, self.config.prompts, score):
            shown = {
                name: round(iteration.stats[name], 3) for name in ("reward_mean", "kl", "grad_norm", "length_mean")
            }
            review = iteration.review.decision.value if iteration.review else "none due"
            print(f"  {shown} review: {review}", file=sys.stderr, flush=True)

    def phases(self) -> Iterator[tuple[str, Measured]]:
        """Yields the name and cost of each phase of an iteration."""
        trainer, copies = self.trainer, self.config.prompts
        collected = trainer.collect(self.queries, self._reward, copies)
        scored = trainer.buffer.stacked()
        trainer.buffer.clear()
        sample = partial(self.policy.sample, self.queries, trainer.generator, copies)
        step = partial(trainer.step, self.queries, self._reward, copies)
        yield "sampling", self._timed(lambda: self._written(sample()))
        yield "scoring", self._timed(lambda: self._reward(collected.prompts))
        yield "anchor's pass", self._timed(lambda: trainer.anchor.logprobs(collected.rollout))
        yield "update", self._timed(lambda: trainer.updater.update(scored, trainer.kl_controller.coef))
        yield "iteration", self._timed(lambda: self._written(step().collected.rollout))

    def _reward(self, prompts: list[str]) -> Any:
        return self.reward(prompts, self.batch)

    def _timed(self, work: Callable[[], object]) -> Measured:
        seconds = []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(REPEATS):
            self.tokens = 0
            self._wait()
            started = time.perf_counter()
            work()
            self._wait()
            seconds.append(time.perf_counter() - started)
        return Measured(median(seconds), self.tokens, peak_memory(self.device) / 1e9)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _count(self, _embedding: torch.nn.Module, ids: tuple[torch.Tensor], _output: torch.Tensor) -> None:
        if ids[0].shape[1] > 1:  # not a decoding step: a GPU may replay these without this hook
            self.tokens += ids[0].numel()

    def _written(self, rollout: Rollout) -> None:
        self.tokens += int(rollout.mask.sum())


@in_order
def main(argv: Sequence[str]) -> int:
    """Prints a table for each shape; returns the exit code."""
    known = shapes()
    parser = Parser("python -m experiments.bench.shapes", __doc__)
    parser.add_argument("shapes", nargs="+", choices=known, help="which sizes to run")
    parser.add_argument("--steps", type=int, default=4, help="iterations of the run before the timing (default: 4)")
    parser.add_argument("--task", default="sst2", help="name or spec of the task (default: sst2)")
    parser.add_argument("--data", default=str(LAB_DIR / "data"), help="folder of the task's rows (default: the lab's)")
    parser.add_argument("--tokenizer", default=str(LAB_DIR / "agent"), help="its folder (default: the lab's)")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="keys of the configuration")
    options = parser.parse_args(argv)
    fixed = ["preset=lora", "prompts=4", "examples.batch_size=16", "sampling.max_new_tokens=100"]
    fixed += ["anchor.period=2", "anchor.prompts=8"]
    for name in options.shapes:
        given = {"agent": name, "target": name, "task": options.task, "data": options.data}
        config = build_config(given, assignments=[*fixed, *options.set])
        bench = Bench(known[name], config, options.tokenizer)
        size = f"{bench.parameters / 1e9:.2f} G parameters in bfloat16, LoRA of rank {config.lora.rank}"
        print(f"{name}: {size}, K {config.prompts}, B {len(bench.batch)}, on {bench.device}", flush=True)
        started = time.perf_counter()
        bench.run(options.steps)
        print(f"  {options.steps} iterations with their reviews: {time.perf_counter() - started:.1f} s")
        print(f"  {'':<16}{'seconds':>9}{'tokens run':>12}{'tokens/s':>12}{'GB':>8}")
        for phase, (seconds, tokens, gigabytes) in bench.phases():
            print(f"  {phase:<16}{seconds:>9.3f}{tokens:>12,}{tokens / seconds:>12,.0f}{gigabytes:>8.1f}", flush=True)
        del bench
    return 0


if __name__ == "__main__":
    sys.exit(main())
