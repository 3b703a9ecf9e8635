"""Loading models: folders from `save_pretrained` load; all others are refused in one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from experiments import train
from experiments.config import RunConfig
from experiments.run import models
from experiments.run.models import NO_NUMBERS, ModelError, check_source, load_model
from tests.conftest import byte_tokenizer, llama


@pytest.fixture
def folder(
    tmp_path: Path,
    tiny_llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    capfd: pytest.CaptureFixture[str],  # swallows the progress bar of save_pretrained
) -> Path:
    path = tmp_path / "agent"
    tiny_llama.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def config(agent: Path | str, **changes: Any) -> RunConfig:
    return RunConfig(agent=str(agent), target=str(agent), device=changes.pop("device", "cpu"), **changes)


def refusal(agent: Path | str, **changes: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(config(agent, **changes), "agent")
    return str(caught.value)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


# -- what can be loaded ------------------------------------------------------------------------------------------


def test_a_folder_gives_back_the_weights_that_were_saved(folder: Path, tiny_llama: PreTrainedModel) -> None:
    loaded = load_model(config(folder), "agent").model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in tiny_llama.state_dict().items())


def test_a_folder_gives_back_the_tokenizer_that_was_saved(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load_model(config(folder), "agent").tokenizer
    assert loaded("Input : é</s>")["input_ids"] == tokenizer("Input : é</s>")["input_ids"]


def test_a_model_is_loaded_in_eval_mode(folder: Path) -> None:
    assert not load_model(config(folder), "agent").model.training


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_target_is_loaded_as_asked_for_and_an_agent_in_float32(name: str, folder: Path) -> None:
    run = config(folder, dtype=name, target_dtype=name)
    assert {p.dtype for p in load_model(run, "target").model.parameters()} == {getattr(torch, name)}
    assert {p.dtype for p in load_model(run, "agent").model.parameters()} == {torch.float32}  # it is trained


def test_a_target_is_frozen_and_an_agent_is_not(folder: Path) -> None:
    assert not any(p.requires_grad for p in load_model(config(folder), "target").model.parameters())
    assert all(p.requires_grad for p in load_model(config(folder), "agent").model.parameters())


@pytest.mark.parametrize("onednn", [True, False])
def test_onednn_computes_only_where_it_may(onednn: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[PreTrainedModel] = []
    monkeypatch.setattr("appo.lm.linear.install", given.append)
    loaded = [load_model(config(folder, onednn=onednn), role).model for role in ("agent", "target")]
    assert given == (loaded if onednn else [])


def test_each_role_has_its_own_model(folder: Path, tmp_path: Path) -> None:
    run = RunConfig(agent=str(tmp_path / "none"), target=str(folder), device="cpu")
    assert load_model(run, "target").model.name_or_path == str(folder)


def test_lab_is_the_labs_folder_of_the_role(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.config.LAB_DIR", folder.parent)
    assert load_model(RunConfig(device="cpu"), "agent").model.name_or_path == str(folder)
    (folder.parent / "small").mkdir()
    folder.rename(folder.parent / "small" / "agent")
    run = RunConfig(agent="lab/small", device="cpu")
    assert load_model(run, "agent").model.name_or_path == str(folder.parent / "small" / "agent")


def test_a_model_that_the_lab_lacks_is_reported_as_a_missing_folder() -> None:
    with pytest.raises(ModelError, match=r"agent: no folder '.*deep.agent'"):
        check_source(RunConfig(agent="lab/deep"), "agent")


# -- folders -----------------------------------------------------------------------------------------------------


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(folder) == f"agent: {str(folder)!r} holds no config.json; expected the folder of a causal LM"


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"agent: {str(folder)!r} holds no weights; expected *.safetensors"


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    # These bytes are no pickle: if they were opened, the message would be another one.
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refusal(folder) == f"agent: {str(folder)!r} holds no weights; expected *.safetensors"


def test_the_lab_before_it_is_built_is_refused_like_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("experiments.config.LAB_DIR", tmp_path)
    with pytest.raises(ModelError, match=f"target: no folder '{tmp_path / 'target'}'"):
        load_model(RunConfig(device="cpu"), "target")


def test_a_missing_folder_gets_the_nearest_name(folder: Path) -> None:
    wrong = folder.parent / "agnet"
    assert refusal(wrong) == f"agent: no folder {str(wrong)!r}; did you mean {str(folder)!r}?"


@pytest.mark.parametrize("name", ["/none/at/all", "./none", "../none", "~/none", "a/b/c"])
def test_a_missing_folder_without_a_near_match_is_refused_without_asking_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_args, **_options: pytest.fail("asked"))
    assert refusal(name) == f"agent: no folder {name!r}"


def test_a_path_below_models_is_not_taken_for_a_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_args, **_options: pytest.fail("asked"))
    assert refusal("models/smolm2") == "agent: no folder 'models/smolm2'; `make weights` puts models there"
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    assert "no folder 'models/smolm2'; did you mean 'models/smollm2'? `make weights`" in refusal("models/smolm2")
    (tmp_path / "mine").mkdir()
    assert refusal("mine/agent") == "agent: no folder 'mine/agent'"


@pytest.mark.parametrize("role", ["agent", "target"])
def test_a_missing_folder_is_refused_before_data_and_models(
    role: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.run.run.load_task", lambda *_: pytest.fail("data were loaded"))
    assert train.main([f"--{role}", "models/no-such-model"]) == 2
    assert f"error: {role}: no folder 'models/no-such-model'" in capsys.readouterr().err


# What the hub says when it cannot be reached, and when a model comes with code. A hub id has at most one slash.
ERRORS = {
    "offline": (OSError("We couldn't connect to\nthe hub to load the files"), "We couldn't connect to the hub to load"),
    "code": (
        ValueError("long words\n" * 90 + "set trust_remote_code=True"),
        "it comes with code of its own, which runs if",
    ),
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("name", ["gpt7", "some/model"])
def test_a_hub_that_fails_is_one_clear_line(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, words = ERRORS[kind]

    def from_pretrained(*_args: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    assert refusal(name).startswith(f"agent: cannot load {name!r}: {words}") and "\n" not in refusal(name)


@pytest.mark.parametrize("trust", [False, True])
def test_a_models_own_code_runs_only_if_trusted(trust: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def from_pretrained(*_args: Any, trust_remote_code: bool) -> None:
        asked.append(trust_remote_code)
        raise OSError

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    refusal("some/model", trust_remote_code=trust)
    assert asked == [trust]


def test_an_error_without_words_is_named_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*_args: Any, **_options: Any) -> None:
        raise OSError

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    assert refusal("some/model") == "agent: cannot load 'some/model': OSError"


# -- broken files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 5, 1000, -10])
def test_truncated_weights_are_refused(kept: int, folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert refusal(folder).startswith(f"agent: cannot load {str(folder)!r}: ")


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    rewrite(folder / "config.json", lambda data: data.update(intermediate_size=128))
    assert refusal(folder).startswith(f"agent: cannot load {str(folder)!r}: ")


def test_weights_that_lack_a_layer_are_refused(folder: Path) -> None:
    # Two layers are saved: a third one would be filled with random numbers.
    rewrite(folder / "config.json", lambda data: data.update(num_hidden_layers=3))
    assert refusal(folder).startswith(f"agent: cannot load {str(folder)!r}: ")


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "no-such-model"}'])
def test_a_broken_config_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert refusal(folder).startswith(f"agent: cannot load {str(folder)!r}: ")


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert refusal(folder).startswith(f"agent: cannot load {str(folder)!r}: ")


def test_a_broken_tokenizer_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    assert refusal(folder).startswith(f"agent: cannot load {str(folder)!r}: ")


SIZES = [{"num_attention_heads": 0}, {"num_key_value_heads": 3}, {"num_hidden_layers": "two"}, {"head_dim": -1}]


@pytest.mark.parametrize("changes", SIZES, ids=str)
def test_sizes_that_do_not_fit_together_are_refused(changes: dict[str, Any], folder: Path) -> None:
    rewrite(folder / "config.json", lambda data: data.update(changes))
    assert refusal(folder).startswith("agent: ")


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 99_999])
def test_a_config_that_is_no_model_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert refusal(folder).startswith(f"agent: cannot load {str(folder)!r}: ")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(value: float, folder: Path, tiny_llama: PreTrainedModel) -> None:
    with torch.no_grad():
        tiny_llama.get_input_embeddings().weight.fill_(value)
    tiny_llama.save_pretrained(folder)
    assert refusal(folder) == f"agent: {str(folder)!r} does not run: {NO_NUMBERS}"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder: Path) -> None:
    llama(9).save_pretrained(folder)
    assert "and the model knows 9 tokens" in refusal(folder)


def test_an_agent_whose_tokenizer_has_no_end_is_refused(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    assert (
        refusal(folder) == f"agent: the tokenizer of {str(folder)!r} has no end-of-sequence token: no prompt would end"
    )
    assert load_model(config(folder), "target").tokenizer.eos_token is None


@pytest.mark.parametrize("role", ["agent", "target"])
def test_a_chat_template_that_is_asked_for_must_be_there(role: Literal["agent", "target"], folder: Path) -> None:
    with pytest.raises(ModelError, match=rf"{role}: {role}_chat is true, but the tokenizer of .* has no chat template"):
        load_model(config(folder, **{f"{role}_chat": True}), role)


@pytest.mark.parametrize("template", ["{{ nothing.at.all }}", "{% if %}", "{{ raise_exception('no') }}"])
def test_a_chat_template_that_cannot_be_filled_is_refused(template: str, folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    assert refusal(folder).startswith(f"agent: the chat template of {str(folder)!r} cannot be filled: ")


def test_a_file_in_place_of_a_folder_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    assert refusal(path) == f"agent: {str(path)!r} is a file; expected the folder of a causal LM"


def test_too_little_memory_is_no_fault_of_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*_args: Any, **_options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(config(folder), "agent")


def test_a_model_that_writes_no_text_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    assert refusal(folder).startswith(f"agent: cannot load {str(folder)!r}: ")


# -- devices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", "", "meta", "hpu", "lazy"])
def test_a_device_that_cannot_be_used_is_named(device: str, folder: Path) -> None:
    message = refusal(folder, device=device)
    assert message.startswith(f"device {device!r} cannot be used: ") and "\n" not in message


@pytest.mark.parametrize(("cuda", "expected"), [(False, "cpu"), (True, "cuda")])
def test_auto_takes_the_gpu_where_there_is_one(cuda: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert models.find_device("auto").type == expected


def test_a_bad_device_is_refused_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_args, **_options: pytest.fail("loaded"))
    assert refusal(folder, device="gpu").startswith("device 'gpu' cannot be used: ")
