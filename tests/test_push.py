"""The upload of an agent: its card is true and usable, a dry run needs no network, and errors are one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from experiments import push, train
from experiments.config import LABS, RunConfig
from experiments.hub.card import model_card
from experiments.run.folder import read_result, stored_config

ROOT = Path(__file__).parents[1]
SMALL = ["prompts=2", "threads=1", "sampling.max_new_tokens=8", "examples.test_limit=10", "pool=2", "headroom=0"]
REPO = "me/an-agent"
LATER = 4_000_000_000  # seconds since 1970


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "secret-name"
    assert train.main(["--task", "sst2", "--steps", "2", "--run", str(folder), *SMALL]) == 0
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "secret-name"))


def card_of(folder: Path) -> str:
    """The card that a dry run writes."""
    assert push.main(["--run", str(folder), "--repo", REPO, "--dry-run"]) == 0
    return (folder / "agent" / "README.md").read_text(encoding="utf-8")


def pushed(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`appo push` in its own process, with a hub that does not answer and without a login from HOME."""
    command = [sys.executable, "-c", "import sys; from experiments.cli import main; sys.exit(main())", "push"]
    without = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    given = without | {"HOME": str(folder), "HF_ENDPOINT": "http://127.0.0.1:9", **environment}
    command += ["--run", str(folder), "--repo", REPO]
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)


# -- the dry run -------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_the_card_and_lists_the_agents_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = card_of(folder)
    captured = capsys.readouterr()
    listed = {name: int(size.replace(",", "")) for size, name in map(str.split, captured.out.splitlines())}
    assert listed == {path.name: path.stat().st_size for path in (folder / "agent").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(listed)
    assert captured.err == f"card: {folder / 'agent' / 'README.md'}\n" and card.startswith("---\n")


def test_an_existing_card_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card_of(folder)
    (folder / "agent" / "README.md").write_text("mine", encoding="utf-8")
    assert card_of(folder) == "mine"
    assert capsys.readouterr().err.endswith("it was there already and is kept\n")
    os.utime(folder / "best_prompt.json", (LATER, LATER))  # as a resumed run leaves it
    card_of(folder)
    assert "the run has a newer result: delete the card to have it written anew" in capsys.readouterr().err


# -- the card ----------------------------------------------------------------------------------------------------


def metadata(card: str) -> dict[str, Any]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_the_metadata_leave_the_licence_to_the_owner(folder: Path) -> None:
    assert metadata(card_of(folder)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["stableprompt", "appo", "prompt-tuning", "reinforcement-learning"],
        "language": "en",
    }


def test_the_card_has_the_prompt_and_every_score_with_rows_and_interval(folder: Path) -> None:
    card, result = card_of(folder), read_result(folder)
    for part in (f"# {REPO.split('/')[1]}", "**sst2**", result["prompt"], result["verdict"], "test (n = 10)"):
        assert part in card
    for name in ("validation", "test", "manual_validation", "manual_test"):
        low, high = result[f"{name}_interval"]
        assert f"{result[f'{name}_score']:.3f} ({low:.3f} to {high:.3f})" in card


def test_the_card_shows_what_differs_from_the_defaults(folder: Path) -> None:
    shown = yaml.safe_load(card_of(folder).split("```yaml\n")[1].split("```")[0])
    config, default = stored_config(folder), RunConfig()
    assert (shown["steps"], shown["prompts"], shown["sampling"]["max_new_tokens"]) == (2, 2, 8)
    assert shown["appo"]["learning_rate"] == config.appo.learning_rate != default.appo.learning_rate
    assert not {"run", "threads", "seed", "mode"} & set(shown)  # of the machine, or as by default


@pytest.mark.parametrize(("one_line", "ends"), [(True, '.strip().split("\\n")[0])'), (False, ".strip())")])
def test_the_code_of_the_card_ends_a_prompt_where_the_run_did(one_line: bool, ends: str, folder: Path) -> None:
    config = stored_config(folder)
    config = replace(config, sampling=replace(config.sampling, one_line=one_line))
    card = model_card(config, read_result(folder), REPO, chat=False)
    assert f'print(written[0]["generated_text"]{ends}' in card


def test_the_card_names_no_folder_of_this_machine(folder: Path, tmp_path: Path) -> None:
    config, result = stored_config(folder), read_result(folder)
    places = {key: str(tmp_path / "secret-name" / "last") for key in ("agent", "target", "data", "task")}
    card = model_card(replace(config, **places), result, REPO, chat=False)  # type: ignore[arg-type]
    assert "secret-name" not in card and str(tmp_path) not in card and "`last`" in card
    assert "secret-name" not in card_of(folder)


def test_a_model_of_the_hub_is_named_as_the_base(folder: Path) -> None:
    config = replace(stored_config(folder), agent="some/model")
    card = model_card(config, read_result(folder), REPO, chat=False)
    assert metadata(card)["base_model"] == "some/model"
    assert "[some/model](https://huggingface.co/some/model)" in card


@pytest.mark.parametrize("agent", LABS)
def test_a_model_of_the_lab_is_no_base_on_the_hub(agent: str, folder: Path) -> None:
    config = replace(stored_config(folder), agent=agent)
    assert "base_model" not in metadata(model_card(config, read_result(folder), REPO, chat=False))


def test_the_card_names_the_model_behind_a_server_and_not_its_address(folder: Path) -> None:
    config = replace(stored_config(folder), target="http://10.0.0.7:8000#some/model")
    card = model_card(config, read_result(folder), REPO, chat=False)
    assert "`some/model`" in card and "10.0.0.7" not in card and "8000" not in card


def test_a_task_of_ones_own_is_in_no_known_language(folder: Path) -> None:
    config = replace(stored_config(folder), task="mine/mood.yaml")
    assert "language" not in metadata(model_card(config, read_result(folder), REPO, chat=False))


def test_a_prompt_cannot_leave_its_block(folder: Path) -> None:
    result = read_result(folder) | {"prompt": "a\n```\n# b\n````", "chosen": "tuned"}
    card = model_card(stored_config(folder), result, REPO, chat=False)
    assert "`````text\na\n```\n# b\n````\n`````\n" in card


def code_of(card: str) -> str:
    found = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert found
    return found[1]


def test_the_cards_python_samples_from_the_whole_distribution_as_in_training(folder: Path) -> None:
    asked = re.search(r"write\(text, (.*?), return_full_text", code_of(card_of(folder)))
    assert asked
    options = eval(f"dict({asked[1]})")
    settings = stored_config(folder).sampling
    assert (options["temperature"], options["max_new_tokens"]) == (settings.temperature, settings.max_new_tokens)
    model = AutoModelForCausalLM.from_pretrained(folder / "agent")
    # transformers makes a processor for each of top_k and top_p that cuts something.
    found, _ = model._prepare_generation_config(None, **options)
    names = {type(cut).__name__ for cut in model._get_logits_processor(found)}
    assert not {"TopKLogitsWarper", "TopPLogitsWarper"} & names


@pytest.mark.parametrize("mode", ["fixed", "tte"])
def test_the_cards_python_runs(
    mode: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, result = replace(stored_config(folder), mode=mode, edit_manual=mode == "tte"), read_result(folder)  # type: ignore[arg-type]
    code = code_of(model_card(config, result, REPO, chat=False))
    assert ("THE INPUT" in code, result["manual_prompt"] in code) == (mode == "tte", mode == "tte")
    local = code.replace(repr(REPO), repr(str(folder / "agent")))
    monkeypatch.chdir(tmp_path)
    exec(compile(local, "the card's code", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_an_agent_with_a_chat_template_is_asked_in_a_chat(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "agent" / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}), encoding="utf-8")
    code = code_of(card_of(folder)).replace(repr(REPO), repr(str(folder / "agent")))
    assert '"role": "assistant", "content": opening' in code
    capsys.readouterr()
    exec(compile(code, "the card's code", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_card_of_edits_needs_no_prompt(folder: Path) -> None:
    config, result = replace(stored_config(folder), mode="tte"), read_result(folder)
    card = model_card(config, result | {"prompt": None, "chosen": "edits"}, REPO, chat=False)
    assert "writes an instruction for each input" in card and "| a prompt for each input |" in card


# -- refusals ----------------------------------------------------------------------------------------------------


def test_without_a_token_one_line_says_how_to_get_one(folder: Path) -> None:
    done = pushed(folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[1:] == [
        "error: there is no token for the hub; run `hf auth login`, or set HF_TOKEN"
    ]


def test_without_a_network_one_line_says_so_and_shows_no_token(folder: Path) -> None:
    done = pushed(folder, HF_TOKEN="hf_abcdef")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[1].startswith(f"error: cannot upload to {REPO}: ")
    assert len(done.stderr.splitlines()) == 2 and "hf_abcdef" not in done.stderr


@pytest.mark.parametrize("repo", ["agent", "a b/c", "me/../x/y", "/", ""])
def test_a_name_that_the_hub_would_not_take_is_refused(
    repo: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push.main(["--run", str(folder), "--repo", repo, "--dry-run"]) == 2
    assert f"error: the name on the hub is {repo!r}; expected OWNER/NAME" in capsys.readouterr().err
    assert not (folder / "agent" / "README.md").exists()


@pytest.mark.parametrize("wrong", ["name", "run"])
def test_a_wrong_name_or_run_is_refused_before_weights_are_merged(
    wrong: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.run.models.save_merged", lambda *_: pytest.fail("merged first"))
    folder, repo = (finished, "no-owner") if wrong == "name" else (tmp_path, REPO)
    assert push.main(["--run", str(folder), "--repo", repo, "--merge"]) == 2


@pytest.mark.parametrize(
    ("gone", "said"), [("best_prompt.json", "holds no best_prompt.json"), ("agent", "holds no folder 'agent'")]
)
def test_a_run_that_is_not_finished_is_refused(
    gone: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(folder / gone, folder.parent / "gone")
    assert push.main(["--run", str(folder), "--repo", REPO, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
