"""The benchmark runs, and refuses to compare ways that give different numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.bench import bench, real, shapes
from experiments.bench.bench import Bench, Shape
from experiments.bench.memory import transient
from experiments.bench.plain import bare_products
from tests.conftest import byte_tokenizer, llama, target_of


@pytest.fixture(autouse=True)
def small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SHAPES", dict.fromkeys(bench.SHAPES, Shape(1100, 64, 1)))
    for name, length in (("PROMPT", 6), ("INPUT", 5), ("QUERY", 7), ("RESPONSE", 4)):
        monkeypatch.setattr(bench, name, length)


def test_every_part_gives_rows_with_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    monkeypatch.setattr("sys.argv", ["bench", "--seconds", "0", "--out", str(path)])
    bench.main()
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["about"]["threads"] == 1
    assert {row["work"].split()[0] for row in found["rows"]} == {"scoring", "sampling", "update", "LoRA", "iteration"}
    assert all(row["ratio"] > 0 for row in found["rows"] if row["unit"] == "s")
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(found["rows"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--out", "no/bench.json"], "'no/bench.json' cannot be written: there is no folder 'no'"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["--threads", "0"], "--threads is 0; expected 1 to"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_timed(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(words) == 2
    said = capsys.readouterr()
    assert said.out == "" and told in said.err


def test_the_real_model_is_decoded_if_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (
        ("MODEL", tmp_path / "model"),
        ("GGUF", tmp_path / "x.gguf"),
        ("QUERY", 9),
        ("RESPONSE", 4),
        ("ANSWERING", tmp_path / "other"),
        ("ANSWER", 3),
        ("LENGTH", 3),
    ):
        monkeypatch.setattr(real, name, value)
    monkeypatch.setattr("sys.argv", ["bench", "--only", "real", "--seconds", "0", "--out", str(tmp_path / "b.json")])
    assert bench.main() == 2
    assert "make weights MODEL=smollm2" in capsys.readouterr().err
    tokenizer = byte_tokenizer()
    for part in (llama(len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "model")
    assert bench.main() == 0
    said = capsys.readouterr()
    assert "reading its weights" in said.out and "update" in said.out
    assert "llama.cpp is left out: it needs the package xllamacpp and" in said.err
    assert "answers are left out: there is no model in" in said.err
    (tmp_path / "model").rename(tmp_path / "other")
    theirs, products, ours = real.scoring().values()
    assert theirs().shape == ours().shape == (real.ASKED, real.EXAMPLES, 2)
    assert products() is None
    generated, written = (way() for way in real.Answers().ways().values())
    assert len(written) == len(real.PROMPTS) * len(real.INPUTS)
    assert sum(a == b for a, b in zip(generated, written, strict=True)) > 0.8 * len(written)  # both in bfloat16


def test_bare_products_are_those_of_the_tokens_that_scoring_runs() -> None:
    tokenizer = byte_tokenizer()
    target = target_of(llama(len(tokenizer)), tokenizer, "{prompt}|{input}", ["a", "b"])
    seen = set[int]()
    for layer in target.lm.model.model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, rows: seen.add(rows[0].numel() // rows[0].shape[-1]))
    bare_products(target, ["one", "three"], ["x", "yz"])()
    assert seen == {(4 + 1 + 2) + (6 + 1 + 2)}  # a prompt with the sign behind it runs once, and each input


def test_ratios_are_medians_of_those_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    # The first times are those of the memory round, which do not count; then the ratios are 3, 4, 2.
    steps = {"slow": iter((9.0, 3.0, 8.0, 6.0)), "ours": iter((1.0, 1.0, 2.0, 3.0))}

    def work(name: str) -> None:
        clock[0] += next(steps[name])

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    measure = Bench(budget=20.0, device="cpu", dtype=torch.float32)
    rows = list(measure.timed("w", {n: lambda n=n: work(n) for n in steps}, [("slow", "ours")]))
    assert (rows[0].theirs, rows[0].ours, rows[0].ratio) == (6.0, 2.0, 3.0)


def test_memory_is_that_of_the_tensors_at_the_peak_minus_what_stays() -> None:
    kept = []

    def work() -> None:
        total = torch.zeros(1000) + torch.ones(1000)  # three tensors of 4,000 bytes at once
        kept.append(total[:10].clone())  # 40 bytes, for good

    assert transient(work, "cpu") == 12_000 - 40
    assert transient(lambda: None, "cpu") == 0


def test_ways_that_differ_are_not_compared() -> None:
    bench.same(torch.ones(3), torch.ones(3) + 1e-6)
    with pytest.raises(RuntimeError, match=r"differ by 1\.0e-03"):
        bench.same(torch.ones(3), torch.tensor([1.0, 1.0, 1.001]))


def test_a_shape_with_random_weights_runs_and_its_phases_are_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr("experiments.bench.shapes.REPEATS", 1)
    small = ["prompts=2", "examples.batch_size=4", "sampling.max_new_tokens=6", "anchor.period=1", "device=cpu"]
    assert shapes.main(["tiny", "--steps", "1", "--set", *small]) == 0
    said = capsys.readouterr()
    assert "review: " in said.err
    assert [line.split("  ")[1] for line in said.out.splitlines()[3:]] == [
        "sampling", "scoring", "anchor's pass", "update", "iteration",
    ]  # fmt: skip
