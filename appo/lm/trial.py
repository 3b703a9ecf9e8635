"""Trials of models that run padded rows: does each text get the logits that it has alone?

No flag says so. Some recurrent models read the padding too, some keep their state where the cache is not looked for:
they would run without an error, and every result would be wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from appo.lm import packed
from appo.lm.attention import Branches
from appo.lm.decoding.growing import Growing

TEXTS = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
OWNER = [0, 1, 1, 0]  # which text each answer continues
ANSWERS = [[3, 5, 8], [2, 4, 7], [5, 1, 6], [4, 2, 3]]  # the last one may begin a step later
APART = 0.2  # standard deviations: in float32 and bfloat16 sound models differ by 0.02 at most, others by 0.7 or more


class UnsupportedModelError(ValueError):
    """Texts that a model runs side by side do not get the logits that they get alone."""


@torch.no_grad()
def check_padding(model: PreTrainedModel) -> None:
    """Runs two texts of different lengths in padded rows, and each alone.

    Raises:
        UnsupportedModelError: the logits differ.
    """
    texts = packed.known(model, TEXTS)
    together = packed.run(model, Branches([[], []], texts, [0, 1]), keep=[1, 1]).logits
    _check_equal(model, "in padded rows", together, texts)


@torch.no_grad()
def check_decoding(model: PreTrainedModel) -> None:
    """Decodes answers to two texts token by token, which end one after the other, and runs each text and answer alone.

    Raises:
        UnsupportedModelError: the logits differ, or the model does not take the cache.
    """
    try:
        _decode(model)
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{_name(model)} cannot be decoded with a cache: {error}") from error


@torch.no_grad()
def lets_join(model: PreTrainedModel) -> bool:
    """Whether an answer that begins beside others, a step later, gets the logits that it has alone."""
    try:
        return _decode(model, joining=True)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of any kind: such answers wait for the others
        return False


def _decode(model: PreTrainedModel, joining: bool = False) -> bool:
    texts, answers = packed.known(model, TEXTS), packed.known(model, ANSWERS)
    responses, begun = Growing(model, texts, OWNER[:3]).spread(), [0, 0, 0, 1]
    for step in range(3):
        if joining and step == 1:
            last = Growing(model, texts[:1], OWNER[3:])
            last.alive += 3
            responses.join(last)
        alive = responses.alive.tolist()
        rows = [[*texts[OWNER[i]], *answers[i][: step - begun[i]]] for i in alive]
        _check_equal(model, "token by token", responses.step().logits, rows)
        fed = torch.tensor([answers[i][step - begun[i]] for i in alive], device=model.device)
        responses.feed(fed, going=responses.alive >= step)
    return True


def _check_equal(model: PreTrainedModel, how: str, logits: Tensor, rows: list[list[int]]) -> None:
    """Compares the last tokens' logits [n, V] with those of the rows, each in a pass of its own."""
    alone = [model(input_ids=torch.tensor([row], device=model.device)).logits[0, -1] for row in rows]
    apart = packed.apart(logits, torch.stack(alone)).max()
    if not apart <= APART:  # also if it is NaN
        raise UnsupportedModelError(
            f"{_name(model)} cannot run several texts at a time: {how} their logits are {apart:.2g} "
            "standard deviations from those of each text alone"
        )


def _name(model: PreTrainedModel) -> str:
    return f"a model of the kind {model.config.model_type!r}"
