"""The plain way to score, sample and update: whole sequences in padded rows, with all logits at all positions.

Published implementations work this way. `experiments.bench` compares our speed with theirs; tests compare the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from appo.functional import policy_loss, value_loss
from appo.lm import linear
from appo.lm.model import CausalLM
from appo.lm.packed import common_prefix
from appo.policy import Policy
from appo.rollout import Batch, Query, Rollout
from appo.trainer import APPOTrainer
from rewards.local import LocalTarget


def as_plain(lm: CausalLM) -> None:
    """Restores the linear layers and the attention that torch and transformers choose for the model."""
    model = lm.model
    linear.uninstall(model)
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)  # SDPA would ignore it
    model.set_attn_implementation("sdpa" if model._supports_sdpa and not capped else "eager")


@torch.inference_mode()
def plain_scores(target: LocalTarget, prompts: Sequence[str], inputs: Sequence[str], size: int) -> Tensor:
    """Returns class logits [K, N, C], prompt by prompt, in padded batches of `size`."""
    words = [word[0] for word in target.verbalizer.tokens]
    logits = []
    for prompt in prompts:
        for start in range(0, len(inputs), size):
            texts = [target.context(prompt, text) for text in inputs[start : start + size]]
            batch = target.lm.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
            mask = batch["attention_mask"].to(target.lm.device)
            output = target.lm.model(
                input_ids=batch["input_ids"].to(target.lm.device),
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            )
            logits.append(output.logits[:, -1, words].float().cpu())
    return torch.cat(logits).view(len(prompts), len(inputs), len(words))


def bare_products(target: LocalTarget, prompts: Sequence[str], inputs: Sequence[str]) -> Callable[[], None]:
    """Returns a lower bound for the time of scoring: only the layers' matrix products, for the tokens that must be run.

    Its ratio to our time is the share of this machine's matrix-product rate that we reach.
    """
    tokens = 0
    for prompt in prompts:
        rows = target.lm.tokens([target.context(prompt, text) for text in inputs])
        tokens += sum(map(len, rows)) - (len(rows) - 1) * common_prefix(rows)
    layers = [layer for layer in target.lm.model.model.modules() if isinstance(layer, nn.Linear)]
    like = {"dtype": target.lm.model.dtype, "device": target.lm.device}
    states = {width: torch.randn(tokens, width, **like) for width in {layer.in_features for layer in layers}}

    @torch.inference_mode()
    def products() -> None:
        for layer in layers:
            layer(states[layer.in_features])

    return products


@torch.no_grad()
def plain_sample(policy: Policy, query: Query, count: int, length: int) -> Rollout:
    """Samples `count` responses of exactly `length` tokens by `generate`; another pass gives logprobs and values."""
    ids = torch.tensor([query.tokens], device=policy.device)
    sequences = policy.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        num_return_sequences=count,
        max_new_tokens=length,
        min_new_tokens=length,
        pad_token_id=0,
    )
    tokens = sequences[:, len(query.tokens) :]
    nothing = torch.zeros(tokens.shape, device=policy.device)
    owner = torch.zeros(count, dtype=torch.long, device=policy.device)
    rollout = Rollout((query,), owner, tokens, tokens >= 0, nothing, nothing)
    logprobs, values, _ = plain_forward(policy, rollout)
    return replace(rollout, logprobs=logprobs, values=values)


def plain_forward(policy: Policy, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-probabilities and values of the responses, [B, T] each, and all logits of the sequences [B, L, V]."""
    queries = torch.tensor([query.tokens for query in rollout.queries], device=policy.device)[rollout.owner]
    ids = torch.cat([queries, rollout.tokens], dim=1)
    output = policy.model(ids, output_hidden_states=True, use_cache=False)
    logprobs = output.logits[:, :-1].log_softmax(-1)
    values = policy.value_head(output.hidden_states[-1]).squeeze(-1)[:, :-1]
    start = queries.shape[1] - 1
    chosen = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return chosen[:, start:], values[:, start:], output.logits


def plain_loss(trainer: APPOTrainer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the loss of `Updater.loss` from a plain pass, and the entropies at all positions, as TRL does."""
    config = trainer.config
    logprobs, values, logits = plain_forward(trainer.policy, batch)
    policy = policy_loss(logprobs, batch.logprobs, batch.advantages, batch.mask, config.clip_range)
    value = value_loss(values, batch.values, batch.returns, batch.mask, config.value_clip_range)
    entropy = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
    return policy.loss + config.value_coef * value.loss, entropy


def plain_update(trainer: APPOTrainer, batch: Batch, passes: int) -> None:
    """Makes `passes` forward passes (for the reference and, in TRL, for the policy itself), then the PPO epochs."""
    with torch.no_grad():
        for _ in range(passes):
            plain_forward(trainer.policy, batch)
    for _ in range(trainer.config.ppo_epochs):
        trainer.updater.optimizer.zero_grad()
        loss, _ = plain_loss(trainer, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.policy.parameters(), 1.0)
        trainer.updater.optimizer.step()
