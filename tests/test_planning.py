"""A plan's memory is that of the real thing: the same step on real tensors, whose bytes are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from appo.anchor import Anchor
from appo.config import APPOConfig
from appo.lm.model import CausalLM
from appo.policy import Policy
from appo.rollout import Batch, Query, Rollout, Scored
from appo.update import Updater, advantages
from experiments.planning.shadow import LiveBytes, Shadow
from tests.conftest import SPECIAL_IDS, byte_tokenizer, plain_sampling

QUERY, RESPONSES, LENGTH = 90, 6, 40
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 2000, "n_embd": 192, "n_layer": 3, "n_head": 6, "n_positions": 512},
    "large vocabulary": {
        "model_type": "qwen2", "vocab_size": 40_000, "hidden_size": 128, "intermediate_size": 320,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    },
}  # fmt: skip


def folder_of(name: str, tmp_path: Path) -> str:
    options = {key: value for key, value in SHAPES[name].items() if key != "model_type"}
    AutoConfig.for_model(SHAPES[name]["model_type"], **options, **SPECIAL_IDS).save_pretrained(tmp_path)
    return str(tmp_path)


def model_of(folder: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def scored() -> Scored:
    torch.manual_seed(0)
    shape = (RESPONSES, LENGTH)
    tokens, mask = torch.randint(3, 200, shape), torch.ones(shape, dtype=torch.bool)
    numbers = (torch.randn(shape) for _ in range(3))
    rollout = Rollout(
        (Query(tuple(range(3, 3 + QUERY))),), torch.zeros(RESPONSES, dtype=torch.long), tokens, mask, next(numbers),
        next(numbers),
    )  # fmt: skip
    return Scored.of(rollout, torch.arange(float(RESPONSES)), next(numbers))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "checkpointing"])
def test_the_memory_of_an_update_is_within_15_percent_of_the_plan(name: str, kind: str, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path)
    dtype, checkpointing = torch.bfloat16 if kind == "bfloat16" else torch.float32, kind == "checkpointing"
    lm = CausalLM(model_of(folder), byte_tokenizer(), None, dtype, checkpointing, onednn=False)
    updater = Updater(Policy(lm, plain_sampling(LENGTH)), APPOConfig(max_ratio=None))
    rows = scored()
    batch = Batch.finish(rows, *advantages(rows, updater.config, 0.1))
    updater.optimizer_step(batch)  # makes the optimizer's moments
    updater.optimizer.zero_grad()
    measured = LiveBytes()
    measured.ignore(updater.policy.parameters())
    with measured:
        updater.optimizer_step(batch)
    shadow = Shadow(folder, computes_in=dtype, trained=True, checkpointing=checkpointing)
    planned = shadow.update([QUERY - 1], [LENGTH] * RESPONSES, [0] * RESPONSES, scaled=False)
    assert planned == pytest.approx(measured.peak, rel=0.15)
    anchor = Anchor(updater.policy, updater.optimizer)
    held = [*updater.policy.parameters(), *anchor.state_dict()["parameters"].values()]
    held += [s for state in updater.optimizer.state.values() for name, s in state.items() if name != "step"]
    assert shadow.trained * 4 * 4 == sum(tensor.numel() * tensor.element_size() for tensor in held)
