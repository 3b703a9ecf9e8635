"""A target that runs behind a server: vLLM, SGLang, llama.cpp, or for text any with OpenAI's interface.

A probe at the start finds out what the server is and can do. Label words are tokenised by the server, in place, and
their log-probabilities looked up by token id: a word of several tokens takes a request for each of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor

from appo.lm.model import ContextTooLongError
from appo.lm.packed import common_prefix
from rewards.connection import AnswerError, Connection
from rewards.local import Verbalizer
from rewards.servers import SERVERS, Ids, Server, TextOnly, sound
from rewards.target import Asked, cut, fill, flat

TRIAL = "Input : a Output : b"
NAMED_WITHIN = 8  # tokens in which a server without log-probabilities has to name a label word


class ServerError(ValueError):
    """A server cannot be a target; the message says which, and why."""


class Address(NamedTuple):
    """Where a server is, and the name of a model there; "": its only one."""

    url: str
    model: str


def address_of(text: str) -> Address:
    """Reads http://host:port#model; a path before the fragment is kept, except for /v1 at its end.

    Raises:
        ServerError: the text is no such address, or holds a password, which would be written into files.
    """
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018  (reading it raises ValueError where it is no number)
    except ValueError as error:
        raise ServerError(f"target: {text!r} is no address of a server ({error})") from None
    if parts.username or parts.password or parts.query:
        raise ServerError(
            "target: the address of a server holds a password or a query; expected http://host:port#model"
        )
    if parts.scheme not in ("http", "https") or not (parts.hostname or "").strip("."):
        raise ServerError(f"target: {text!r} is no address of a server; expected http://host:port#model")
    return Address(f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}", parts.fragment)


def find_server(connection: Connection, model: str, chat: bool = False) -> Server:
    """The server at the other end, after a trial with a known text and two of its tokens.

    Args:
        connection: to the server.
        model: its name there; "": the only one.
        chat: whether requests are to be put into the model's chat template.

    Raises:
        ServerError: nothing answers, the model is not there, or the server can neither score nor write.
    """
    try:
        listed = connection.get("/v1/models")
    except AnswerError as error:
        raise ServerError(f"target: {error}") from error
    cards = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
        raise ServerError(f"target: {connection.url}/v1/models lists no models; expected a server for language models")
    names = [str(card["id"]) for card in cards]
    wanted = [card for card in cards if model in (card["id"], *(card.get("aliases") or []))] if model else cards
    if len(wanted) != 1:
        what = f"no model {model!r}" if model else f"{len(names)} models"
        raise ServerError(
            f"target: {connection.url} has {what}; name one of them, as {connection.url}#{names[0]}: {names}"
            if names
            else f"target: {connection.url} has no models"
        )
    (card,) = wanted
    kinds = [kind for kind in SERVERS if kind.owner == card.get("owned_by")] or [*SERVERS]
    refused = []
    for kind in kinds:
        server = kind(connection, card, chat)
        try:
            with understood(server):
                _try_scores(server)
        except AnswerError as error:
            refused.append(f"as {kind.name}: {error}")
        else:
            return server
    server = TextOnly(connection, card, chat)
    try:
        with understood(server):
            server.write(server.prompt(TRIAL), 1, [])
    except AnswerError as error:
        raise ServerError(f"target: {'; '.join([*refused, str(error)])}") from error
    server.refused = "; ".join(refused)
    return server


def _try_scores(server: Server) -> None:
    """Raises AnswerError unless the server tells the log-probabilities of two tokens behind a known text."""
    ids = server.tokens(TRIAL)
    pair = list(dict.fromkeys([ids[-1], *ids]))[:2]
    found = server.logprobs(ids, pair)
    if not sound(found):
        raise AnswerError(f"{server.name} answers with {found} for log-probabilities of the tokens {pair}")


@contextmanager
def understood(server: Server) -> Iterator[None]:
    """Turns an answer without the fields that this kind of server gives into an AnswerError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ContextTooLongError | ServerError):  # which say what is wrong already
            raise
        url = server.connection.url
        raise AnswerError(f"{url} does not answer as {server.name} does ({type(error).__name__}: {error})") from error


class ServedTarget:
    """A frozen model behind a server under prompts; see `rewards.target.Target`.

    Where the server gives no log-probabilities, it writes, and the label word that its text begins with has logit 0
    and the others -inf; all have -inf if it names none.

    Args:
        server: from `find_server`.
        template: text with {prompt} and {input}, ending where the answer begins.
        words: the label words in class order; none where the answer is text.
        inputs: some of the task's inputs. If the template ends in {input}, the words follow an input's last character.

    Attributes:
        kept: if set, called with each answer as soon as it is known, in any thread: a row for `Remembered.learn`.

    Raises:
        ServerError: the server's tokenizer cannot tell two label words apart, or their tokens depend on the input.
    """

    def __init__(
        self,
        server: Server,
        template: str,
        words: Sequence[str],
        inputs: Sequence[str] = ("input",),
    ) -> None:
        self.server, self.template, self.words = server, template, tuple(words)
        self.kept: Callable[[dict[str, Any]], None] | None = None
        self.verbalizer = Verbalizer((), (), 0)
        if words and server.scores:
            # Behind fixed text the words' tokens are the same, whatever the input.
            places = inputs if template.endswith("{input}") else inputs[:1]
            self.verbalizer, *others = dict.fromkeys(
                self._each(self._verbalizer, [self.context("prompt", text) for text in places])
            )
            if others:
                raise ServerError(
                    "target: a label word's tokens depend on the input before it; let the template end in fixed text"
                )
        # For each beginning of a word, the tokens that may follow it: a request each.
        self._next: dict[tuple[int, ...], list[int]] = {}
        for word in self.verbalizer.tokens:
            for i, token in enumerate(word):
                self._next.setdefault(word[:i], []).append(token)
        self._longest = max(map(len, self.verbalizer.tokens), default=1) - 1

    def context(self, prompt: str, text: str) -> str:
        """The request: what the target answers to."""
        return fill(self.template, prompt, text)

    def described(self) -> dict[str, Any]:
        """The kind of the server, the model's name there, and whether its chat template is used."""
        return {"server": self.server.name, "model": self.server.model, "chat": self.server.chat}

    def cost(self) -> dict[str, int]:
        """What the server was asked for so far: requests, retries and tokens of prompts."""
        return dict(self.server.connection.cost)

    def check_fits(self, prompt: str | int, text: str) -> None:
        """Refuses an input that leaves no room for the prompt (or, given a number, for a prompt of that length).

        Raises:
            ContextTooLongError: they do not fit into the context that the server names.
        """
        if self.server.context is None or not self.server.scores:
            return
        room, written = (prompt, "") if isinstance(prompt, int) else (0, prompt)
        (ids,) = self._each(self.server.tokens, [self.context(written, text)])
        self._check_width(len(ids) - self.verbalizer.overlap + room + self._longest)

    def _check_width(self, width: int) -> None:
        limit = self.server.context
        if limit is not None and width + 1 > limit:  # one token is always generated
            raise ContextTooLongError(
                f"a filled template does not fit into the target's context: up to {width} tokens and one of an answer, "
                f"but the server's context holds {limit}"
            )

    def _each(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        def sure(item: Any) -> Any:
            with understood(self.server):
                return work(item)

        return self.server.connection.each(sure, items)

    # -- label words -------------------------------------------------------------------------------------------------

    def _verbalizer(self, context: str) -> Verbalizer:
        base, *full = [self.server.tokens(context, word) for word in ("", *self.words)]
        try:
            return Verbalizer.placed(self.words, base, full)
        except ValueError as error:
            raise ServerError(f"target: {error}") from error

    def class_logits(self, asked: Sequence[Asked]) -> Tensor:
        """Log-likelihoods of the label words behind each filled template.

        Returns:
            [B, C] float32, on the CPU.

        Raises:
            AnswerError: a request got no usable answer.
            ContextTooLongError: a filled template is longer than the context that the server names.
        """
        return torch.stack(self._each(self._logits, flat(asked)))

    def _logits(self, pair: tuple[str, str]) -> Tensor:
        context = self.context(*pair)
        values = self._scored(context) if self.server.scores else self._named(context)
        logits = torch.tensor(values, dtype=torch.float32, device="cpu")
        self._keep(pair, logits=logits.tolist())
        return logits

    def _keep(self, pair: tuple[str, str], **found: Any) -> None:
        if self.kept:
            self.kept({"prompt": pair[0], "input": pair[1], **found})

    def _scored(self, context: str) -> list[float]:
        ids = self.server.tokens(context)
        ids = ids[: len(ids) - self.verbalizer.overlap]
        self._check_width(len(ids) + self._longest)
        known: dict[tuple[int, ...], float] = {}  # beginning of a word -> log-probability of its last token
        for stem, following in self._next.items():
            wanted = list(dict.fromkeys(following))
            found = self.server.logprobs([*ids, *stem], wanted)
            known |= {(*stem, token): value for token, value in zip(wanted, found, strict=True)}
        return [sum(known[word[: i + 1]] for i in range(len(word))) for word in self.verbalizer.tokens]

    def _named(self, context: str) -> list[float]:
        text = self._written(context, NAMED_WITHIN, ["\n"])
        best = named_in(text, self.words)
        return [0.0 if word == best else -torch.inf for word in self.words]

    # -- text --------------------------------------------------------------------------------------------------------

    def generate(self, asked: Sequence[Asked], budget: int, stop: Sequence[str]) -> list[str]:
        """Greedy answers, cut before the first stop string.

        Returns:
            B texts, stripped.

        Raises:
            AnswerError: a request got no usable answer.
            ContextTooLongError: a filled template and the longest answer do not fit into the server's context.
        """

        def write(pair: tuple[str, str]) -> str:
            text = self._written(self.context(*pair), budget, stop)
            self._keep(pair, budget=budget, stop=list(stop), text=text)
            return text

        return self._each(write, flat(asked))

    def _written(self, context: str, budget: int, stop: Sequence[str]) -> str:
        prompt = self.server.prompt(context)
        if not isinstance(prompt, str):
            self._check_width(len(prompt) + budget - 1)
        found = self.server.write(prompt, budget, stop)
        if found.stopped and not found.text.strip():  # a stop string that leads does not count
            found = self.server.write(prompt, budget, [])
        return cut(found.text, stop)[0].strip()

    def answer_logprobs(self, asked: Sequence[Asked], answers: Sequence[str]) -> Tensor:
        """Mean log-probability per token of each answer to its own input; a request for each token.

        Returns:
            [B] float32 on the CPU, at most 0.

        Raises:
            AnswerError: a request got no usable answer.
            ContextTooLongError: a filled template and its answer do not fit into the server's context.
        """
        means = self._each(self._mean_logprob, list(zip(flat(asked), answers, strict=True)))
        return torch.tensor(means, dtype=torch.float32, device="cpu")

    def _mean_logprob(self, asked: tuple[tuple[str, str], str]) -> float:
        pair, answer = asked
        context = self.context(*pair)
        before: Ids = self.server.tokens(context)
        after: Ids = self.server.tokens(context, answer)
        self._check_width(len(after) - 1)
        start = common_prefix([before, after])
        found = [self.server.logprobs(after[:i], [after[i]])[0] for i in range(start, len(after))]
        mean = sum(found) / len(found)
        self._keep(pair, answer=answer, logprob=mean)
        return mean


def named_in(text: str, words: Sequence[str]) -> str | None:
    """Returns the longest of the words that the text begins with, in any case; None if it begins with none.

    Signs before a word are passed over unless they belong to one, as in "-1".
    """
    for said in (text, re.sub(r"^\W+", "", text)):
        found = [word for word in words if re.match(rf"{re.escape(word.casefold())}(?!\w)", said.casefold())]
        if found:
            return max(found, key=len)
    return None
