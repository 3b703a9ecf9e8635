"""APPO (Adaptive PPO, StablePrompt, arXiv 2410.07652) for causal language models.

    from appo import APPOConfig, APPOTrainer, CausalLM, Policy

    policy = Policy(CausalLM(model, tokenizer))
    trainer = APPOTrainer(policy, APPOConfig(kl_coef=0.1))
    for iteration in trainer.fit([policy.query("Write a question.", "")], reward_fn, steps=50):
        print(iteration.stats["reward_mean"], iteration.collected.prompts[0])

The maths is in `appo.functional`; start reading there. Names are loaded on first use, since torch takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appo.anchor import Anchor, AnchorDecision, KLController, decide
    from appo.config import AnchorConfig, APPOConfig, SamplingConfig
    from appo.lm.model import CausalLM, ContextTooLongError
    from appo.policy import Policy
    from appo.rollout import Batch, Query, Rollout, Scored
    from appo.trainer import AnchorReview, APPOTrainer, DivergedError, Iteration

__version__ = "0.1.0"
__all__ = [
    "APPOConfig", "APPOTrainer", "Anchor", "AnchorConfig", "AnchorDecision", "AnchorReview", "Batch", "CausalLM",
    "ContextTooLongError", "DivergedError", "Iteration", "KLController", "Policy", "Query", "Rollout",
    "SamplingConfig", "Scored", "decide",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    parts = ("config", "lm.model", "rollout", "policy", "anchor", "trainer")
    modules = (import_module(f"appo.{part}") for part in parts)
    return next(getattr(module, name) for module in modules if hasattr(module, name))
