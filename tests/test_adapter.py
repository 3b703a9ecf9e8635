"""An agent that is a LoRA adapter on a frozen base: its numbers, and what is trained, shared and saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from appo.config import APPOConfig, SamplingConfig
from appo.lm import adapter, linear
from appo.lm.attention import Branches
from appo.lm.model import CausalLM
from appo.policy import Policy
from appo.selfcheck import self_check
from appo.trainer import APPOTrainer
from experiments.bench.plain import as_plain
from experiments.config import LAB_DIR, RunConfig, build_config
from experiments.config.strict import ConfigError
from experiments.planning.estimate import Estimate, Options
from experiments.planning.outlook import lengths_of
from experiments.push import main as push
from experiments.run.folder import read_jsonl
from experiments.run.models import ModelError, load_model, load_models, save_agent, save_merged
from experiments.run.run import open_run, prepare
from experiments.train import main as train
from experiments.tuning.header import loaded
from rewards.local import LocalTarget
from rewards.target import grid

peft = pytest.importorskip("peft")
BRANCHES = Branches([[1, 2, 3, 4], [5]], [[6, 7, 8], [9], [3, 2]], [0, 0, 1])


def logits(lm: CausalLM) -> torch.Tensor:
    with torch.no_grad():
        return lm.run(BRANCHES).logits.clone()


def shake(model: torch.nn.Module) -> None:
    """Gives a new adapter random weights, since a new one has no effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))


def adapted(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, first: str, **options: object) -> CausalLM:
    """A model with an adapter that has an effect, added before or after the model was made a CausalLM."""
    if first == "adapter":
        adapter.add(model, rank=4)
        lm = CausalLM(model, tokenizer, **options)
    else:
        lm = CausalLM(model, tokenizer, **options)
        adapter.add(model, rank=4)
    shake(model)
    return lm


def trainer_of(lm: CausalLM) -> APPOTrainer:
    policy = Policy(lm, SamplingConfig(max_new_tokens=12))
    return APPOTrainer(policy, APPOConfig(learning_rate=1e-2), generator=torch.Generator().manual_seed(0))


def lengths(prompts: list[str]) -> list[float]:
    return [float(len(prompt)) for prompt in prompts]


# -- the adapter -------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    lm = CausalLM(tiny_llama, tokenizer)
    before = logits(lm)
    adapter.add(tiny_llama, rank=4)
    assert torch.equal(logits(lm), before)
    trained = {name for name, p in tiny_llama.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("embed" in name or "lm_head" in name for name in trained)


@pytest.mark.parametrize("first", ["adapter", "CausalLM"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_packed_equals_padded_with_an_adapter_on(
    first: str, name: str, request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase
) -> None:
    lm = adapted(request.getfixturevalue(name), tokenizer, first)
    assert lm.packed
    packed = logits(lm)
    as_plain(lm)
    assert_close(packed, logits(lm), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", ["adapter", "CausalLM"])
def test_onednn_layers_keep_the_adapter(
    first: str, tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "is_faster", lambda: True)
    monkeypatch.setattr(linear, "FEW", 1)
    lm = adapted(tiny_llama, tokenizer, first)
    assert any(isinstance(module, linear.OneDNNLinear) for module in tiny_llama.modules())
    with_onednn = logits(lm)
    linear.uninstall(tiny_llama)
    assert_close(with_onednn, logits(lm), rtol=1e-4, atol=1e-4)
    with adapter.switched_off(tiny_llama):
        assert not torch.allclose(with_onednn, logits(lm), atol=1e-2)


def test_switching_off_gives_the_base_and_leaves_what_is_trained(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = logits(CausalLM(tiny_llama, tokenizer))
    agent = adapted(tiny_llama, tokenizer, "CausalLM")
    frozen = next(p for p in tiny_llama.parameters() if p.requires_grad).requires_grad_(False)
    before = {name for name, p in tiny_llama.named_parameters() if p.requires_grad}
    target = agent.without_adapter(chat=False)
    assert torch.equal(logits(target), base)
    assert not torch.equal(logits(agent), base)
    assert {name for name, p in tiny_llama.named_parameters() if p.requires_grad} == before
    assert not frozen.requires_grad  # peft would have made it trainable
    assert (agent.frozen, target.frozen) == (False, True)


# -- training ----------------------------------------------------------------------------------------------------


def test_only_the_adapter_and_the_value_head_move_and_go_into_anchor_optimizer_and_checkpoint(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    adapter.add(tiny_llama, rank=4)
    trainer = trainer_of(CausalLM(tiny_llama, tokenizer))
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    query = trainer.policy.query("Write", "")
    self_check(trainer.policy, trainer.anchor, trainer.policy.sample([query], trainer.generator, 4))
    for _ in range(2):
        trainer.step([query], lengths, 8)
    moved = {name for name, p in trainer.policy.named_parameters() if not torch.equal(p, before[name])}
    trained = set(trainer.policy.trained())
    assert moved == trained
    assert all("lora_" in name or name.startswith("value_head") for name in trained)
    state = trainer.state_dict()
    assert set(state["policy"]) == set(state["anchor"]["parameters"]) == trained
    assert sum(len(group["params"]) for group in state["optimizer"]["param_groups"]) == len(trained)


def test_a_checkpoint_of_an_adapter_restores_it(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    adapter.add(tiny_llama, rank=4)
    trainer = trainer_of(CausalLM(tiny_llama, tokenizer))
    query = trainer.policy.query("Write", "")
    trainer.step([query], lengths, 8)
    state = {**trainer.state_dict(), "policy": {n: p.clone() for n, p in trainer.policy.trained().items()}}
    snapshot = {name: p.clone() for name, p in state["anchor"]["parameters"].items()}
    state["anchor"] = {**state["anchor"], "parameters": snapshot}
    expected = trainer.step([query], lengths, 8).collected.prompts
    trainer.step([query], lengths, 8)
    trainer.load_state_dict(state)
    assert trainer.step([query], lengths, 8).collected.prompts == expected


def test_an_adapter_on_a_model_coarser_than_it_is_said_to_compute_in_is_refused(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_llama.to(torch.bfloat16)
    adapter.add(model, rank=4)
    with pytest.raises(ValueError, match=r"the model is in torch\.bfloat16; pass compute_dtype=torch\.bfloat16"):
        trainer_of(CausalLM(model, tokenizer))


def test_a_base_in_bfloat16_carries_an_adapter_and_a_head_in_float32(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_llama.to(torch.bfloat16)
    adapter.add(model, rank=4)
    trainer = trainer_of(CausalLM(model, tokenizer, compute_dtype=torch.bfloat16))
    assert {p.dtype for p in trainer.policy.trained().values()} == {torch.float32}
    assert model.get_output_embeddings().weight.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    query = trainer.policy.query("Write", "")
    rollout = trainer.policy.sample([query], trainer.generator, 4)
    self_check(trainer.policy, trainer.anchor, rollout)
    stats = trainer.step([query], lengths, 8).stats
    assert stats["kl"] == 0.0
    assert stats["grad_norm"] > 0


# -- loading, sharing, saving ------------------------------------------------------------------------------------


def shared(**changes: object) -> RunConfig:
    given = [f"{key}={value}" for key, value in changes.items()]
    agent = str(LAB_DIR / "agent")
    return build_config({"agent": agent, "target": agent}, assignments=["lora.rank=4", "threads=1", *given])


def test_agent_and_target_of_one_checkpoint_share_it_and_answer_as_two_copies() -> None:
    agent, target = load_models(shared())
    assert target.model is agent.model
    both = load_models(shared(target_dtype="float32")), load_model(shared(target_dtype="float32"), "target")
    assert both[0][1].model is both[0][0].model
    words, asked = ["yes", "no"], grid(["Say yes.", ""], ["one", "another one"])
    shake(agent.model)  # as training would
    alone = LocalTarget(both[1], "{prompt} {input} : ", words)
    assert torch.equal(LocalTarget(target, "{prompt} {input} : ", words).class_logits(asked), alone.class_logits(asked))
    assert LocalTarget(target, "{prompt} {input} : ", ()).generate(asked, 5, ()) == LocalTarget(
        both[1], "{prompt} {input} : ", ()
    ).generate(asked, 5, ())


@pytest.mark.parametrize(
    "changes",
    [{"lora.rank": "null"}, {"target_dtype": "bfloat16"}, {"target": str(LAB_DIR / "target")}],
    ids=["no adapter", "another dtype", "another checkpoint"],
)
def test_otherwise_there_are_two_copies(changes: dict[str, str]) -> None:
    agent, target = load_models(shared(**changes))
    assert target.model is not agent.model


def test_memory_holds_one_copy() -> None:
    """Bytes of distinct weights: of base and adapter, not of two bases."""
    agent, target = load_models(shared())
    found = {p.data_ptr(): p.nbytes for lm in (agent, target) for p in lm.model.parameters()}
    base = sum(
        p.nbytes
        for p in load_model(shared(**{"lora.rank": "null", "target_dtype": "float32"}), "target").model.parameters()
    )
    added = sum(p.nbytes for p in agent.model.parameters() if p.requires_grad)
    assert sum(found.values()) == base + added
    assert 0 < added < base / 5


def test_a_saved_adapter_loads_here_in_peft_and_merged(tmp_path: Path) -> None:
    agent = load_model(shared(), "agent")
    shake(agent.model)
    save_agent(Policy(agent), tmp_path / "agent")
    assert {path.name for path in (tmp_path / "agent").glob("*.safetensors")} == {"adapter_model.safetensors"}
    again = load_model(shared(agent=tmp_path / "agent"), "agent")
    assert torch.equal(logits(again), logits(agent))
    assert all(p.requires_grad == ("lora_" in name) for name, p in again.model.named_parameters())
    save_merged(tmp_path / "agent", tmp_path / "merged")
    merged = load_model(shared(agent=tmp_path / "merged", **{"lora.rank": "null"}), "agent")
    assert not adapter.is_in(merged.model)
    assert_close(logits(merged), logits(agent), rtol=1e-4, atol=1e-3)
    base = AutoModelForCausalLM.from_pretrained(LAB_DIR / "agent")
    with pytest.warns(FutureWarning):  # peft uses a name that transformers is about to drop
        wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "agent")
    theirs = CausalLM(wrapped.base_model.model, agent.tokenizer)
    assert_close(logits(theirs), logits(agent), rtol=1e-4, atol=1e-4)


def test_a_run_with_an_adapter_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    small = ["lora.rank=4", "prompts=4", "headroom=0", "examples.test_limit=8", "threads=1", "checkpoint_every=1"]
    assert train(["--task", "mnli", "--steps", "2", "--run", str(run), *small]) == 0
    assert len(read_jsonl(run / "metrics.jsonl")) == 2
    state = next((run / "checkpoint").glob("step-*")) / "state.pt"
    base = (LAB_DIR / "agent" / "model.safetensors").stat().st_size
    assert state.stat().st_size < base
    assert adapter.is_in(open_run(run).policy.model)
    capsys.readouterr()
    assert push(["--run", str(run), "--repo", "me/agent", "--dry-run"]) == 0
    assert "adapter_model.safetensors" in capsys.readouterr().out
    card = (run / "agent" / "README.md").read_text()
    assert "library_name: peft" in card
    assert push(["--run", str(run), "--repo", "me/agent", "--merge", "--dry-run"]) == 0
    assert "model.safetensors" in (listed := capsys.readouterr().out)
    assert "adapter" not in listed
    assert load_model(build_config({"agent": str(run / "merged")}), "agent").frozen is False


def test_the_header_and_the_plan_know_an_adapter_by_its_folder(tmp_path: Path) -> None:
    save_agent(Policy(load_model(shared(), "agent")), tmp_path / "agent")
    (tmp_path / "link").symlink_to(LAB_DIR / "agent")
    config = shared(agent=tmp_path / "agent", target=tmp_path / "link", **{"lora.rank": "null"})
    run = prepare(config)
    said = " ".join(loaded(run))
    trained = sum(weight.numel() for weight in run.policy.trained().values())
    assert f"trains an adapter of {trained / 1e6:.2f} M parameters; agent and target share the rest" in said
    assert "learning rate 1.7e-05, by the size of the agent's weights" in said  # of the base: half the adapter is 0
    planned = Options.of(config, bfloat16=False)
    assert (planned.rank, planned.shared) == (4, True)
    assert Estimate(config, lengths_of(run), planned).agent.trained == trained
    assert "adapter 0." in said and "target's weights" not in said  # as in the plan of the same configuration


def test_an_update_that_changes_nothing_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_given: None)
    small = ["lora.rank=4", "prompts=4", "headroom=0", "examples.test_limit=8", "threads=1"]
    assert train(["--task", "mnli", "--steps", "2", "--run", str(tmp_path / "run"), *small]) == 3
    assert "the first update had a gradient and changed no weight" in capsys.readouterr().err


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lora.rank=0", "rank is 0; expected at least 1"),
        ("lora.alpha=0", "alpha is 0.0; expected above 0"),
        ("lora.dropout=0.05", "dropout is 0.05; expected 0: with it, PPO's ratios would not start at 1"),
        ("lora.targets=q_proj,,v_proj", "expected all-linear, or names of layers between commas"),
    ],
)
def test_values_that_make_no_sense_are_refused(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_config({}, assignments=[given])


def test_unknown_layer_names_are_refused_in_one_line() -> None:
    for wrong in ("wrong_proj", "q_proj,wrong_proj", "all-linear,wrong_proj"):
        with pytest.raises(ModelError, match=rf"^agent: no adapter fits .* with lora.targets={wrong}: .*wrong_proj"):
            load_model(shared(**{"lora.targets": wrong}), "agent")


def test_a_rank_above_that_of_every_layer_is_refused() -> None:
    load_model(shared(**{"lora.rank": 96}), "agent")  # the lab's agent is 96 wide
    with pytest.raises(ModelError, match=r"^agent: no adapter fits .*: the rank is 97; expected at most 96"):
        load_model(shared(**{"lora.rank": 97}), "agent")


def test_an_adapter_without_its_base_is_refused_in_one_line(tmp_path: Path) -> None:
    shutil.copytree(LAB_DIR / "agent", tmp_path / "base")
    agent = load_model(shared(agent=tmp_path / "base"), "agent")
    save_agent(Policy(agent), tmp_path / "agent")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ModelError, match=r"holds an adapter to '.*base', which is not there any more"):
        load_model(shared(agent=tmp_path / "agent"), "agent")
    with pytest.raises(ModelError, match="holds no adapter"):
        save_merged(LAB_DIR / "agent", tmp_path / "merged")


# -- a target in few bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.75), ("int4", 0.6)])
def test_a_quantised_target_is_smaller_and_answers_much_the_same(
    kind: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("bitsandbytes")
    asked = {"threads": 1, "target_dtype": "bfloat16", "target_quantization": kind}
    plain = load_model(build_config({}, assignments=["threads=1"]), "target")
    small = load_model(build_config({}, assignments=[f"{key}={value}" for key, value in asked.items()]), "target")
    assert small.frozen
    sizes = [sum(p.nbytes for p in lm.model.parameters()) for lm in (plain, small)]
    assert sizes[1] < share * sizes[0]
    assert torch.corrcoef(torch.stack([logits(plain).flatten(), logits(small).float().flatten()]))[0, 1] > 0.97
    assert "MatMul8bitLt" not in caplog.text  # bitsandbytes tells of its casts in every layer
