"""The way to a server: requests over kept-alive connections, so many at once, asked again where that may help."""

from __future__ import annotations

import math
import random
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

try:  # the client that huggingface_hub brings along, so that it costs no dependency
    import httpx2 as http
except ImportError:  # huggingface_hub before 2.0
    import httpx as http  # type: ignore[no-redef]

T = TypeVar("T")
R = TypeVar("R")
IN_FLIGHT = 32  # requests at once
AGAIN = (408, 425, 429)  # besides 5xx: statuses that may pass
LONGEST_PAUSE = 60.0  # seconds
SHOWN = 300  # characters of a server's own words in an error


class AnswerError(RuntimeError):
    """A request got no usable answer; the message says which, from where, and why."""


class Connection:
    """A server, and what it was asked for so far. Its methods may be called from many threads.

    What may pass is asked again after a pause that doubles each time and is partly random, or as long as the server
    says: statuses 408, 425, 429 and 5xx, no connection, a cut one, no answer in time, an answer that is no JSON.
    Neither proxies nor .netrc are read from the environment.

    Args:
        url: of the server, without a path of an endpoint.
        key: sent as a bearer token; "": none; ValueError if no request can carry it. It is never shown: a server's own
            words are cleaned of it.
        timeout: seconds until a request counts as unanswered.
        attempts: how often a request is sent before it fails.
        pause: seconds before the second attempt, on average.
        in_flight: most requests at once.

    Attributes:
        cost: "requests", "retries" (requests that were sent again) and "prompt_tokens" (as the server counts them).
    """

    def __init__(
        self,
        url: str,
        key: str = "",
        timeout: float = 300.0,
        attempts: int = 8,
        pause: float = 1.0,
        in_flight: int = IN_FLIGHT,
    ) -> None:
        key = key.strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError("the key holds characters that no key can have; expected printable ASCII")
        self.url, self.in_flight = url, in_flight
        self.cost: Counter[str] = Counter(requests=0, retries=0, prompt_tokens=0)
        self._key, self._attempts, self._pause = key, attempts, pause
        self._random, self._lock = random.Random(), threading.Lock()  # not the global stream, which a run is seeded by
        self._client = http.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=http.Timeout(timeout, connect=min(timeout, 10.0)),
            limits=http.Limits(max_connections=in_flight, max_keepalive_connections=in_flight),
            trust_env=False,
        )
        weakref.finalize(self, self._client.close)

    def get(self, path: str) -> Any:
        """What the server has under a path, read from JSON. Fails at once if nothing listens there.

        Raises:
            AnswerError: no usable answer.
        """
        return self._ask("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The server's answer to a body, both JSON.

        Raises:
            AnswerError: no usable answer.
        """
        return self._ask("POST", path, dict(body))

    def count(self, prompt_tokens: object) -> None:
        """Adds the tokens of a prompt, as the server counts them, to the cost."""
        with self._lock:
            self.cost["prompt_tokens"] += prompt_tokens if isinstance(prompt_tokens, int) else 0

    def each(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """The results of `work` for each item, in their order, with at most `in_flight` of them under way.

        If one fails, no further one is begun; those under way are finished first, and then the failure is raised.
        """
        todo, done, failures = deque(enumerate(items)), dict[int, R](), list[Exception]()

        def take() -> None:
            while not failures:
                try:
                    index, item = todo.popleft()
                except IndexError:
                    return
                try:
                    done[index] = work(item)
                except Exception as error:  # raised again below, in the caller's thread
                    failures.append(error)

        # Daemons: a second Ctrl-C must not wait for a server that hangs.
        workers = [threading.Thread(target=take, daemon=True) for _ in range(min(self.in_flight, len(items)))]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            todo.clear()  # on Ctrl-C
        if failures:
            raise failures[0]
        return [done[index] for index in range(len(items))]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        attempt = 0
        while True:
            attempt += 1
            with self._lock:
                self.cost["requests"] += 1
                self.cost["retries"] += attempt > 1
            told: float | None = None
            try:
                reply = self._client.request(method, path, json=body)
                if reply.is_success:
                    return reply.json()
                why = f"status {reply.status_code}: {self._words_of(reply)}"
                if reply.status_code not in AGAIN and reply.status_code < 500:
                    raise AnswerError(f"{self.url}{path} refuses a request with {why}")
                told = _told_pause(reply.headers.get("retry-after"))
            except http.RequestError as error:
                why = self._clean(f"{type(error).__name__} {error}")
                if isinstance(error, http.ConnectError | http.ConnectTimeout) and body is None:
                    raise AnswerError(f"no server at {self.url} ({why})") from error
            except ValueError:
                why = "the answer is no JSON"
            if attempt == self._attempts:
                raise AnswerError(f"{self.url}{path} gave no answer in {attempt} attempts, at last: {why}")
            doubled = min(LONGEST_PAUSE, self._pause * 2 ** (attempt - 1))
            jitter = self._random.uniform(0.5, 1.5)
            time.sleep(doubled * jitter if told is None else told + self._pause * (jitter - 0.5))

    def _words_of(self, reply: http.Response) -> str:
        """What the server says about an error, in the places where servers put it."""
        try:
            said = reply.json()
        except ValueError:
            said = reply.text
        for name in ("error", "message", "detail"):
            said = said.get(name, said) if isinstance(said, dict) else said
        return self._clean(str(said)) or reply.reason_phrase

    def _clean(self, text: str) -> str:
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:SHOWN]


def _told_pause(header: str | None) -> float | None:
    """The seconds that a Retry-After header names, as a number or a date; None if there is none."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), LONGEST_PAUSE) if math.isfinite(seconds) else None
