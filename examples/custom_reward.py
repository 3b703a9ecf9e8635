"""The library in thirty lines: an agent learns to write text that your own function rewards.

python examples/custom_reward.py         half a minute; the lab's agent learns to write short instructions
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from appo import APPOConfig, APPOTrainer, CausalLM, Policy, SamplingConfig

LAB = Path(__file__).parents[1] / "experiments" / "lab" / "agent"
REQUEST = "Look at the instruction and current input,\nrewrite instruction for current input."


def reward(prompts: list[str]) -> list[float]:
    """A number for each prompt: here, minus its length in words; an empty prompt gets -50."""
    return [-float(len(prompt.split())) if prompt else -50.0 for prompt in prompts]


def main(steps: int = 20) -> list[float]:
    """Trains the agent; returns the mean reward of each iteration."""
    model = AutoModelForCausalLM.from_pretrained(LAB)
    policy = Policy(CausalLM(model, AutoTokenizer.from_pretrained(LAB)), SamplingConfig(max_new_tokens=48))
    trainer = APPOTrainer(policy, APPOConfig(learning_rate=4e-4), generator=torch.Generator().manual_seed(0))
    means = []
    for iteration in trainer.fit([policy.query(REQUEST, "The Rewritten instruction was :")], reward, steps, copies=16):
        means.append(iteration.stats["reward_mean"])
        print(f"{len(means):3d}  mean reward {means[-1]:7.2f}  {iteration.collected.prompts[0]}")
    return means


if __name__ == "__main__":
    main()
