"""What each server is asked, and where its answer stands: vLLM, SGLang, llama.cpp, and any with OpenAI's interface.

All that a target needs of a server is here: the tokens of a text, the log-probabilities of some tokens behind others,
and the likeliest continuation. Requests hold token ids, so that a label word is looked up where it was tokenised.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rewards.connection import AnswerError, Connection

Ids = list[int]
GREEDY = {  # spelt out, as a server may take its defaults from the model's generation_config
    "temperature": 0,
    "top_p": 1,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}


class Written(NamedTuple):
    """A continuation, and whether a stop string ended it."""

    text: str
    stopped: bool


class Server(ABC):
    """One model behind one kind of server.

    Args:
        connection: to the server.
        card: what the server says about the model in its list of models.
        chat: put requests into the model's chat template.

    Attributes:
        name: of the kind.
        owner: what such a server says of itself in its list of models.
        scores: whether it gives log-probabilities of chosen tokens.
        model: the model's name there.
        context: most tokens that the model can see; None: not known.
        refused: why it gives no log-probabilities; "": it does.
    """

    name: str
    owner: str
    scores = True

    def __init__(self, connection: Connection, card: Mapping[str, Any], chat: bool) -> None:
        self.connection, self.chat, self.model = connection, chat, str(card["id"])
        self.context, self.refused = _context(card), ""

    @abstractmethod
    def tokens(self, request: str, answer: str = "") -> Ids:
        """Token ids of a request and the beginning of its answer; special tokens are added as the model wants them."""

    def prompt(self, request: str) -> Ids | str:
        """What `write` continues after a request: its token ids or, where the server makes them itself, its text."""
        return self.tokens(request)

    @abstractmethod
    def logprobs(self, ids: Ids, wanted: Sequence[int]) -> list[float]:
        """Log-probability of each wanted token right behind the ids."""

    @abstractmethod
    def write(self, prompt: Ids | str, budget: int, stop: Sequence[str]) -> Written:
        """The likeliest continuation of what `prompt` made, up to a stop string."""

    def _ask(self, path: str, body: Mapping[str, Any]) -> Any:
        return self.connection.post(path, body)

    def _found(self, known: Mapping[int, float], wanted: Sequence[int], among: str) -> list[float]:
        """The wanted ones of the known log-probabilities; a missing one is an error, never a zero."""
        missing = [t for t in wanted if not isinstance(known.get(t), int | float) or not sound([known[t]])]
        if missing:
            raise AnswerError(f"{self.name} gave no log-probability of the tokens {missing}: they are not {among}")
        return [float(known[token]) for token in wanted]


class Vllm(Server):
    """`/tokenize` and `/v1/completions` with `logprob_token_ids`."""

    name, owner = "vLLM", "vllm"

    def tokens(self, request: str, answer: str = "") -> Ids:
        body: dict[str, Any] = {"model": self.model, "add_special_tokens": not self.chat}
        if self.chat:
            body |= {"messages": [{"role": "user", "content": request}], "add_generation_prompt": not answer}
            if answer:
                body["messages"].append({"role": "assistant", "content": answer})
                body["continue_final_message"] = True
        else:
            body["prompt"] = plain(request, answer)
        return _ids(self._ask("/tokenize", body)["tokens"])

    def logprobs(self, ids: Ids, wanted: Sequence[int]) -> list[float]:
        # Names of tokens as text may collide; and only the named tokens are returned, however unlikely they are.
        exact = {"logprobs": 1, "logprob_token_ids": sorted(set(wanted)), "return_tokens_as_token_ids": True}
        choice = self._completion(ids, 1, [], exact)
        top = choice["logprobs"]["top_logprobs"][0]
        known = {int(name.removeprefix("token_id:")): value for name, value in top.items()}
        return self._found(known, wanted, "in its answer; logprob_token_ids needs a vLLM from June 2026 on")

    def write(self, prompt: Ids | str, budget: int, stop: Sequence[str]) -> Written:
        choice = self._completion(prompt, budget, stop, {})
        return Written(choice["text"], isinstance(choice.get("stop_reason"), str))

    def _completion(self, prompt: Ids | str, budget: int, stop: Sequence[str], more: Mapping[str, Any]) -> Any:
        body = {"model": self.model, "prompt": prompt, "max_tokens": budget, **GREEDY, "stop": list(stop), **more}
        reply = self._ask("/v1/completions", body)
        self.connection.count((reply.get("usage") or {}).get("prompt_tokens"))
        return reply["choices"][0]


class SGLang(Server):
    """`/tokenize` and `/generate` with `token_ids_logprob`.

    `/v1/score` would do for label words of one token, but it answers with probabilities, which lose the unlikely.
    """

    name, owner = "SGLang", "sglang"

    def tokens(self, request: str, answer: str = "") -> Ids:
        if self.chat:
            raise AnswerError("SGLang tokenises no chats; use target_chat=false, or vLLM or llama.cpp")
        return _ids(self._ask("/tokenize", {"model": self.model, "prompt": plain(request, answer)})["tokens"])

    def logprobs(self, ids: Ids, wanted: Sequence[int]) -> list[float]:
        # logprob_start_len 0 would ask for the prompt's own log-probabilities, for which nothing cached can be used.
        exact = {"return_logprob": True, "token_ids_logprob": sorted(set(wanted)), "logprob_start_len": -1}
        given = self._generate(ids, 1, [], exact)["meta_info"]["output_token_ids_logprobs"][0]
        return self._found({token: value for value, token, *_ in given}, wanted, "in its answer")

    def write(self, prompt: Ids | str, budget: int, stop: Sequence[str]) -> Written:
        reply = self._generate(prompt, budget, stop, {})
        reason = reply["meta_info"].get("finish_reason") or {}
        return Written(reply["text"], isinstance(reason.get("matched"), str))

    def _generate(self, ids: Ids | str, budget: int, stop: Sequence[str], more: Mapping[str, Any]) -> Any:
        sampling = {**GREEDY, "max_new_tokens": budget, "stop": list(stop)}
        reply = self._ask("/generate", {"input_ids": ids, "sampling_params": sampling, **more})
        self.connection.count(reply["meta_info"].get("prompt_tokens"))
        return reply


class LlamaCpp(Server):
    """`/tokenize`, `/apply-template` and `/completion` with `n_probs`.

    It only tells the log-probabilities of the likeliest tokens. Where one that is wanted is not among them, more are
    asked for, in the end the whole vocabulary.
    """

    name, owner = "llama.cpp", "llamacpp"
    TOP = 100  # a hundred cost some 10 kB an answer

    def __init__(self, connection: Connection, card: Mapping[str, Any], chat: bool) -> None:
        super().__init__(connection, card, chat)
        self._vocabulary = _in_meta(card, "n_vocab") or 0

    def tokens(self, request: str, answer: str = "") -> Ids:
        if self.chat:
            asked = self._ask("/apply-template", {"messages": [{"role": "user", "content": request}]})
            text = f"{asked['prompt']}{answer}"  # which has its special tokens
        else:
            text = plain(request, answer)
        body = {"content": text, "add_special": not self.chat, "parse_special": self.chat}
        return _ids(self._ask("/tokenize", body)["tokens"])

    def logprobs(self, ids: Ids, wanted: Sequence[int]) -> list[float]:
        sizes = [self.TOP, *([20 * self.TOP, self._vocabulary] if self._vocabulary else [])]
        known: dict[int, float] = {}
        for size in sizes:
            reply = self._completion(ids, 1, [], {"n_probs": size}, "completion_probabilities")
            top = reply["completion_probabilities"][0]["top_logprobs"]
            known = {entry["id"]: entry["logprob"] for entry in top}
            if all(token in known for token in wanted):
                break
        return self._found(known, wanted, f"among the {len(known)} likeliest")

    def write(self, prompt: Ids | str, budget: int, stop: Sequence[str]) -> Written:
        reply = self._completion(prompt, budget, stop, {}, "content", "stop_type")
        return Written(reply["content"], reply.get("stop_type") == "word")

    def _completion(
        self, ids: Ids | str, budget: int, stop: Sequence[str], more: Mapping[str, Any], *fields: str
    ) -> dict[str, Any]:
        # Without a cache the same request gets the same logits, whatever was asked before.
        greedy = {"temperature": 0, "samplers": ["temperature"], "cache_prompt": False}
        body = {"model": self.model, "prompt": ids, "n_predict": budget, "stop": list(stop), **greedy, **more}
        reply: dict[str, Any] = self._ask(
            "/completion", {**body, "response_fields": [*fields, "tokens_evaluated", "truncated"]}
        )
        self.connection.count(reply.get("tokens_evaluated"))
        if reply.get("truncated"):
            raise AnswerError(f"llama.cpp cut a prompt of {len(ids)} tokens; give each slot a larger context (-c)")
        return reply


class TextOnly(Server):
    """`/v1/completions`, or in a chat `/v1/chat/completions`, of any other server: text, without log-probabilities."""

    name, owner, scores = "a server without log-probabilities", "", False

    def tokens(self, request: str, answer: str = "") -> Ids:
        raise AnswerError(f"{self.name} tells no tokens")

    def prompt(self, request: str) -> Ids | str:
        return request

    def logprobs(self, ids: Ids, wanted: Sequence[int]) -> list[float]:
        raise AnswerError(f"{self.name} tells no log-probabilities")

    def write(self, prompt: Ids | str, budget: int, stop: Sequence[str]) -> Written:
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        # Only fields of OpenAI's interface: such a server may refuse others.
        body = {"model": self.model, **asked, "max_tokens": budget, "temperature": 0, "stop": list(stop)}
        reply = self._ask("/v1/chat/completions" if self.chat else "/v1/completions", body)
        self.connection.count((reply.get("usage") or {}).get("prompt_tokens"))
        choice = reply["choices"][0]
        # The server does not say whether a stop string or an end token ended the text; see `ServedTarget._written`.
        return Written((choice["message"]["content"] if self.chat else choice["text"]) or "", bool(stop))


SERVERS: tuple[type[Server], ...] = (Vllm, SGLang, LlamaCpp)


def plain(request: str, answer: str) -> str:
    """A plain request and its answer, with white space between them."""
    return f"{request}{'' if not answer or not request or request[-1].isspace() else ' '}{answer}"


def sound(logprobs: Sequence[float]) -> bool:
    """Whether these can be log-probabilities of different tokens: no NaN, and none that add up to more than 1."""
    return all(value <= 0.001 for value in logprobs) and math.fsum(map(math.exp, logprobs)) <= 1.01


def _ids(found: object) -> Ids:
    if not isinstance(found, list) or not all(isinstance(token, int) for token in found):
        raise AnswerError("the server's answer about the tokens of a text holds no token ids")
    return found


def _context(card: Mapping[str, Any]) -> int | None:
    """The context that a list of models names: vLLM's and SGLang's field, or llama.cpp's, which is that of a slot."""
    found = card.get("max_model_len")
    return found if isinstance(found, int) else _in_meta(card, "n_ctx")


def _in_meta(card: Mapping[str, Any], name: str) -> int | None:
    """A number that llama.cpp names in its list of models; None if it names none."""
    meta = card.get("meta")
    found = meta.get(name) if isinstance(meta, Mapping) else None
    return found if isinstance(found, int) else None
