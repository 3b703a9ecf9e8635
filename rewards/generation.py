"""What a target says when it is left to speak: greedy continuations of filled templates, and how likely answers are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from appo.lm import packed
from appo.lm.attention import Branches
from appo.lm.cache import closed_up, new_cache
from rewards.target import NO_NUMBERS, TargetModel, encode, out_of_memory

T = TypeVar("T")


@torch.inference_mode()
def generate(
    target: TargetModel, prompts: Sequence[str], inputs: Sequence[str], max_new_tokens: int, stop: Sequence[str]
) -> list[str]:
    """Greedy answers of the target, to each input under its own prompt.

    Nothing of the model's generation_config is used: the likeliest token is taken, until an end-of-sequence token, a
    stop string or the budget. A stop string ends the answer and is no part of it.

    Args:
        target: the frozen model and its template.
        prompts: B instructions.
        inputs: B rendered inputs.
        max_new_tokens: longest answer, in tokens.
        stop: texts that end an answer.

    Returns:
        B texts, stripped.

    Raises:
        ContextTooLongError: a filled template and the longest answer do not fit into the target's context.
        FloatingPointError: the target's logits are not numbers.
    """
    texts = [target.context(prompt, text) for prompt, text in zip(prompts, inputs, strict=True)]
    contexts = encode(target.tokenizer, texts, target.chat)
    widths = [len(ids) + max_new_tokens for ids in contexts]
    target.check_width(max(widths, default=0))
    return _batched(target, widths, lambda rows: _greedy(target, [contexts[r] for r in rows], max_new_tokens, stop))


def _greedy(target: TargetModel, contexts: list[list[int]], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
    model, tokenizer = target.model, target.tokenizer
    ids, mask = packed.pad_left(contexts, model.device)
    cache = new_cache(model)
    written: list[list[int]] = [[] for _ in contexts]
    texts = [""] * len(contexts)
    active = list(range(len(contexts)))  # rows still in the batch
    ends = packed.end_tokens(model, tokenizer)
    for _ in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=packed.real_positions(mask)[:, -ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if output.logits[:, -1].isnan().any():  # which argmax would prefer to any number
            raise FloatingPointError(NO_NUMBERS)
        tokens = output.logits[:, -1].argmax(-1)
        going = [False] * len(active)
        for place, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            if token in ends:
                continue
            written[row].append(token)
            texts[row], stopped = _cut(tokenizer.decode(written[row], skip_special_tokens=True), stop)
            going[place] = not stopped
        if not any(going):
            break
        kept = closed_up(torch.tensor(going, device=model.device))
        if len(kept) < len(active):
            cache.reorder_cache(kept)
        active = [active[place] for place in kept.tolist()]
        ids = tokens[kept].unsqueeze(1)
        mask = torch.cat([mask[kept], mask.new_ones(len(kept), 1)], dim=1)
    return [text.strip() for text in texts]


def _cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop string, and whether there is one; white space it begins with stops nothing."""
    lead = len(text) - len(text.lstrip())
    places = [place for word in stop if (place := text.find(word, lead)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


@torch.inference_mode()
def answer_logprobs(
    target: TargetModel, prompts: Sequence[str], inputs: Sequence[str], answers: Sequence[str]
) -> Tensor:
    """Mean log-probability per token of each answer to its own input under its own prompt.

    Args:
        target: the frozen model and its template.
        prompts: B instructions.
        inputs: B rendered inputs.
        answers: their B answers.

    Returns:
        [B] float32 on the CPU, at most 0.

    Raises:
        ContextTooLongError: a filled template and its answer do not fit into the target's context.
    """
    contexts = [target.context(prompt, text) for prompt, text in zip(prompts, inputs, strict=True)]
    wholes = [
        context + ("" if target.chat or context[-1:].isspace() else " ") + answer
        for context, answer in zip(contexts, answers, strict=True)
    ]
    before, after = (encode(target.tokenizer, texts, target.chat) for texts in (contexts, wholes))
    target.check_width(max(map(len, after), default=0))
    lengths = [len(w) - packed.common_prefix([b, w]) for b, w in zip(before, after, strict=True)]

    def means(rows: list[int]) -> list[float]:
        counts = [lengths[r] for r in rows]
        # A token is predicted by the state before it, hence the last token is not run.
        batch = Branches([[]], [after[r][:-1] for r in rows], [0] * len(rows))
        logprobs = packed.run(target.model, batch, counts).logits.float().log_softmax(-1)
        tokens = torch.tensor([token for r in rows for token in after[r][-lengths[r] :]], device=logprobs.device)
        chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return [part.mean().item() for part in chosen.split(counts)]

    return torch.tensor(_batched(target, list(map(len, after)), means), device="cpu")


def _batched(target: TargetModel, widths: Sequence[int], work: Callable[[list[int]], list[T]]) -> list[T]:
    """Does the work on rows of similar width together, each padded batch within the target's budget, or one row.

    The budget is halved whenever memory runs out.
    """
    done: dict[int, T] = {}
    todo = sorted(range(len(widths)), key=lambda row: widths[row])
    while todo:
        size = 1
        while size < len(todo) and widths[todo[size]] * (size + 1) <= target.max_batch_tokens:
            size += 1
        try:
            done |= zip(todo[:size], work(todo[:size]), strict=True)
        except RuntimeError as error:
            if size == 1 or not out_of_memory(error):
                raise
            target.max_batch_tokens = size // 2 * widths[todo[size - 1]]
        else:
            todo = todo[size:]
    return [done[row] for row in range(len(widths))]
