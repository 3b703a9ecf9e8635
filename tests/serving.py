"""A local server with the interface of vLLM, SGLang, llama.cpp or a plain OpenAI server, over a real model.

It answers with the logits of the given model. Faults can be injected: a status, a hang, a cut connection, a delay.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple

import torch

from appo.lm.attention import Branches
from appo.lm.model import CausalLM

OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp", "plain": "somebody"}


class Fault(NamedTuple):
    """What goes wrong with a request: a status, a cut connection, seconds of delay, or several of these."""

    status: int = 0
    cut: bool = False
    delay: float = 0.0
    retry_after: str = ""


NONE = Fault()


class _Listener(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: connections are cut on purpose."""


class Serving:
    """Serves a model while a block runs.

    Args:
        lm: the model.
        kind: a key of OWNERS.
        name: the model's name.
        fault: what goes wrong with a request, by its number from 0 and its path.
        top: llama.cpp gives at most so many tokens.
        key: refuses requests without this key.
        drops: names of fields that it ignores or leaves out, as an older version does.

    Attributes:
        url: where it is.
        seen: (path, body) of every request, faulty ones included.
        card: what else its list of models says about the model.
        scored: the prompts whose log-probabilities were told.
        most: most requests that were under way at once.
    """

    def __init__(
        self,
        lm: CausalLM,
        kind: str = "vllm",
        name: str = "lab",
        fault: Callable[[int, str], Fault] = lambda number, path: NONE,
        top: int = 10**9,
        key: str = "",
        drops: Sequence[str] = (),
    ) -> None:
        self.lm, self.kind, self.name, self.fault = lm, kind, name, fault
        self.top, self.key, self.drops = top, key, drops
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.card: dict[str, Any] = {}
        self.scored: list[tuple[int, ...]] = []  # with, for llama.cpp, how many tokens were told
        self.most, self._now = 0, 0
        self._lock, self._model = threading.Lock(), threading.Lock()
        self._known: dict[tuple[int, ...], torch.Tensor] = {}
        self._http = _Listener(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Serving:
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        serving = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections stay open
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                serving._take(self, {})

            def do_POST(self) -> None:
                serving._take(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _take(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self._lock:
            number = len(self.seen)
            self.seen.append((handler.path, body))
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            fault = self.fault(number, handler.path)
            time.sleep(fault.delay)
            if fault.cut:
                handler.close_connection = True
                handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
                return
            if self.key and handler.headers.get("Authorization") != f"Bearer {self.key}":
                said = handler.headers.get("Authorization", "none")
                status, reply = 401, {"error": {"message": f"wrong key: {said}"}}
            elif fault.status:
                status, reply = fault.status, {"error": {"message": "injected"}}
            else:
                status, reply = self._reply(handler.path, body)
            data = json.dumps(reply).encode()
            handler.send_response(status)
            if fault.retry_after:
                handler.send_header("Retry-After", fault.retry_after)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)
        finally:
            with self._lock:
                self._now -= 1

    # -- what each kind answers --------------------------------------------------------------------------------------

    def _reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            card: dict[str, Any] = {"id": self.name, "owned_by": OWNERS[self.kind]}
            if self.kind == "llamacpp":
                card["meta"] = {"n_ctx": self.lm.context, "n_vocab": self.lm.vocabulary}
            elif self.kind != "plain":
                card["max_model_len"] = self.lm.context
            return 200, {"object": "list", "data": [card | self.card]}
        if body.get("model", self.name) != self.name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        answer = {
            ("vllm", "/tokenize"): self._tokens,
            ("vllm", "/v1/completions"): self._completions,
            ("sglang", "/tokenize"): self._tokens,
            ("sglang", "/generate"): self._generate,
            ("llamacpp", "/tokenize"): self._tokens,
            ("llamacpp", "/apply-template"): self._template,
            ("llamacpp", "/completion"): self._completion,
            ("plain", "/v1/completions"): self._completions,
        }.get((self.kind, path))
        return (200, answer(body)) if answer else (404, {"detail": "Not Found"})

    def _template(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": self._chat(body)}

    def _chat(self, body: dict[str, Any]) -> str:
        ended = body.get("add_generation_prompt", True)
        return str(
            self.lm.tokenizer.apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=ended, continue_final_message=not ended
            )
        )

    def _tokens(self, body: dict[str, Any]) -> dict[str, Any]:
        if "messages" in body:
            text, special = self._chat(body), False
        else:
            text = body["content" if self.kind == "llamacpp" else "prompt"]
            special = (
                body.get("add_special", False) if self.kind == "llamacpp" else body.get("add_special_tokens", True)
            )
        parse = body.get("parse_special", True)
        ids = self.lm.tokenizer(text, add_special_tokens=special, split_special_tokens=not parse)["input_ids"]
        return {"tokens": list(ids), "count": len(ids), "max_model_len": self.lm.context}

    def _completions(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else self.lm.tokens([prompt])[0]
        text, stopped = self._write(ids, body["max_tokens"], body["stop"])
        choice: dict[str, Any] = {"index": 0, "text": text, "stop_reason": stopped, "logprobs": None}
        if body.get("logprobs") and self.kind == "vllm":
            row = self._row(ids)
            wanted = [] if "logprob_token_ids" in self.drops else body.get("logprob_token_ids", [])
            told = {*wanted, int(row.argmax())}
            self._score(ids)
            choice["logprobs"] = {"top_logprobs": [{f"token_id:{token}": row[token].item() for token in told}]}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, sampling = body["input_ids"], body["sampling_params"]
        text, stopped = self._write(ids, sampling["max_new_tokens"], sampling["stop"])
        reason = {"type": "stop", "matched": stopped} if stopped else {"type": "length"}
        meta: dict[str, Any] = {"prompt_tokens": len(ids), "finish_reason": reason}
        if body.get("return_logprob"):
            row = self._row(ids)
            self._score(ids)
            told = reversed(body["token_ids_logprob"])
            meta["output_token_ids_logprobs"] = [[[row[token].item(), token, None] for token in told]]
        return {"text": text, "meta_info": meta}

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = body["prompt"]
        text, stopped = self._write(ids, body["n_predict"], body["stop"])
        reply: dict[str, Any] = {"content": text, "stop_type": "word" if stopped else "limit"}
        reply |= {"tokens_evaluated": len(ids), "truncated": False}
        if body.get("n_probs"):
            row = self._row(ids)
            self._score([body["n_probs"], *ids])
            best = row.topk(min(body["n_probs"], self.top, len(row))).indices.tolist()
            top = [{"id": token, "logprob": row[token].item()} for token in best]
            reply["completion_probabilities"] = [{"id": best[0], "top_logprobs": top}]
        return {name: reply[name] for name in body["response_fields"] if name in reply and name not in self.drops}

    # -- the model ---------------------------------------------------------------------------------------------------

    def _score(self, ids: Sequence[int]) -> None:
        with self._lock:
            self.scored.append(tuple(ids))

    def _row(self, ids: Sequence[int]) -> torch.Tensor:
        """[V] log-probabilities of the next token."""
        with self._model, torch.inference_mode():
            key = tuple(ids)
            if key not in self._known:
                logits = self.lm.run(Branches([[]], [list(ids)], [0]), [1]).logits
                self._known[key] = logits.view(-1).float().log_softmax(-1)
            return self._known[key]

    def _write(self, ids: Sequence[int], budget: int, stop: Sequence[str]) -> tuple[str, str | None]:
        """The greedy continuation up to a stop string wherever it stands, and that string."""
        written: list[int] = []
        text = ""
        for _ in range(budget):
            token = int(self._row([*ids, *written]).argmax())
            if token in self.lm.ends:
                break
            written.append(token)
            text = self.lm.decode_text(written)
            for word in stop:
                if word in text:
                    return text[: text.index(word)], word
        return text, None
