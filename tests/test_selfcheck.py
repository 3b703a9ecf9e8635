"""The check of the first rollout passes on a sound one and names the cause of an unsound one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from appo.anchor import Anchor
from appo.policy import Policy
from appo.rollout import Rollout
from appo.selfcheck import SelfCheckError, self_check
from tests.conftest import plain_sampling, policy_of


def ready(model, tokenizer) -> tuple[Policy, Anchor, Rollout]:
    return rolled_out(policy_of(model, tokenizer, plain_sampling(8)))


def rolled_out(policy: Policy) -> tuple[Policy, Anchor, Rollout]:
    queries = [policy.query("", text) for text in ("a", "a much longer query")]
    rollout = policy.sample(queries, torch.Generator().manual_seed(0), copies=2)
    return policy, Anchor(policy, torch.optim.AdamW(policy.parameters())), rollout


def test_a_sound_rollout_passes(tiny_lm, tokenizer) -> None:
    self_check(*ready(tiny_lm, tokenizer))


def test_another_temperature_is_named(tiny_lm, tokenizer) -> None:
    policy, anchor, rollout = ready(tiny_lm, tokenizer)
    policy.sampling = replace(policy.sampling, temperature=2.0)
    with pytest.raises(SelfCheckError, match="temperature"):
        self_check(policy, anchor, rollout)


def test_a_cut_distribution_is_named(tiny_llama, tokenizer) -> None:
    policy, anchor, rollout = ready(tiny_llama, tokenizer)
    kept = 0.6  # top-k renormalises what it keeps: every log-probability grows by -ln of the kept mass
    renormalised = (rollout.logprobs - torch.tensor(kept).log()).masked_fill(~rollout.mask, 0.0)
    with pytest.raises(SelfCheckError, match="top_k"):
        self_check(policy, anchor, replace(rollout, logprobs=renormalised))


def test_a_model_in_training_mode_passes_since_passes_are_without_dropout(tiny_gpt2, tokenizer) -> None:
    policy, anchor, rollout = ready(tiny_gpt2, tokenizer)
    tiny_gpt2.train()
    self_check(policy, anchor, rollout)


def test_ignored_position_ids_are_named(tiny_gpt2, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(tiny_gpt2, tokenizer, plain_sampling(8))
    forward = tiny_gpt2.forward  # changed after the model was loaded, which a trial would have refused
    monkeypatch.setattr(tiny_gpt2, "forward", lambda position_ids, **rest: forward(**rest))
    with pytest.raises(SelfCheckError, match="position ids"):
        self_check(*rolled_out(policy))


def test_an_anchor_that_is_another_model_is_named(tiny_llama, tokenizer) -> None:
    policy, anchor, rollout = ready(tiny_llama, tokenizer)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(1.01)
    with pytest.raises(SelfCheckError, match="KL to the anchor"):
        self_check(policy, anchor, rollout)
