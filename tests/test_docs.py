"""The docs: files, names, links, commands and keys that they mention exist, and their code runs."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import COMMANDS
from experiments.compare import parse_args as parse_comparison
from experiments.config import RunConfig, build_config
from experiments.config.strict import dotted_keys
from experiments.prompt import main as prompt
from experiments.tasks import main as tasks
from experiments.terminal.command import Parser
from experiments.train import main as train
from experiments.tuning.study import Study
from tasks.catalogue import load_spec
from tests.test_makefile import printed

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import reference

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = [page for page in PAGES if page.name not in reference.PAGES]  # by hand
PLACES = re.findall(r"`([\w/]+\.py):(\d+)`\s+`(\w+)`", (ROOT / "docs" / "house.md").read_text(encoding="utf-8"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:[A-Z]+=\S+ )*(make|appo|\.venv/bin/appo|python) ")
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return BLOCK.sub("", text_of(page))


def blocks(page: Path, *languages: str) -> list[str]:
    """The page's blocks of code in these languages."""
    return [body for language, body in BLOCK.findall(text_of(page)) if language in languages]


def spans(page: Path) -> list[str]:
    """Returns the texts in backticks, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


# -- names, files and links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "line", "name"), PLACES)
def test_a_name_is_defined_where_the_house_says(file: str, line: str, name: str) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [n for n, text in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b", text)]
    assert int(line) in found, f"{file}: {name} is at {found}; run `python docs/reference.py`"


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub makes for the page's headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# What's `a_b`?\n\n## C: d, e\n\n```\n# no heading\n```\n\n## C: d, e\n", encoding="utf-8")
    assert anchors(page) == {"whats-a_b", "c-d-e", "c-d-e-1"}


@EACH_PAGE
def test_links_within_the_tree_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        to = page.parent / path if path else page
        assert to.exists(), link
        assert not anchor or anchor in anchors(to), link


@EACH_PAGE
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:appo|rewards|tasks|experiments|tests|examples|docs)/[\w/.]+)`", text_of(page)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("picture", re.findall(r'<img src="([^"]+)"', text_of(ROOT / "README.md")))
def test_the_readmes_pictures_are_there(picture: str) -> None:
    assert (ROOT / picture).is_file()


def test_every_picture_says_what_it_shows() -> None:
    for page in PAGES:
        for picture in re.findall(r"<img [^>]*>", text_of(page)):
            assert re.search(r' alt="[^"]{20,}"', picture), picture
        assert "![](" not in text_of(page)


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").split()) < 1200


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_generated_page_is_what_its_generator_makes(name: str) -> None:
    made = reference.PAGES[name]()
    assert made == text_of(ROOT / "docs" / name), f"docs/{name} is not up to date: run `python docs/reference.py`"


def test_the_configuration_page_has_every_key_once() -> None:
    found = re.findall(r"^\| `([\w.]+)` \| [^|]+ \| `[^`]+` \| ", reference.configuration(), re.MULTILINE)
    presets = reference.configuration().index("## Presets")
    keys = re.findall(r"^\| `([\w.]+)` \|", reference.configuration()[:presets], re.MULTILINE)
    assert sorted(keys) == sorted(dotted_keys(RunConfig))
    assert set(keys) <= set(found)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert (tmp_path / "site" / "sources" / "appo" / "anchor.py.txt").is_file()  # a file that a page links to


# -- commands and keys ---------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """Carries parsed options out of a command; as it is not an Exception, no command catches it."""


def check(words: list[str]) -> None:
    """Checks a command line with the command's own parser, without running the command."""
    while re.fullmatch(r"[A-Z]+=.*", words[0]):  # of the environment
        words = words[1:]
    words = words[: words.index(">")] if ">" in words else words
    program, *rest = words
    if program == "make":
        makefile = text_of(ROOT / "Makefile")
        for name in [word.partition("=")[0] for word in rest if "=" in word]:
            assert f"$({name})" in makefile, f"make knows no {name}"
        for line in printed(*rest).splitlines():
            if line.startswith("bin/appo "):
                check(shlex.split(line))
    elif program == "python":
        module, file = rest[0] == "-m", rest[0]
        assert importlib.util.find_spec(rest[1]) if module else (ROOT / file).is_file(), words
    else:
        check_appo(rest)


def check_appo(words: list[str]) -> None:
    name, *rest = words
    assert name in COMMANDS, f"appo has no command {name}"
    if not rest:
        return
    if name == "compare":
        build_config({"task": (options := parse_comparison(rest)).task}, None, options.assignments)
        return
    try:
        importlib.import_module(f"experiments.{name}").main(rest)
    except Parsed as parsed:
        options = vars(*parsed.args)
        if name == "train":
            keys = {key: value for key, value in options.items() if key in RunConfig.__dataclass_fields__}
            build_config(keys, options["config"], options["assignments"])
    except SystemExit as end:  # --help
        assert end.code == 0
    else:
        raise AssertionError(f"not as it should be: appo {shlex.join(words)}")


@pytest.fixture
def only_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends every command as soon as its command line has been read."""

    def ending(method: str) -> Any:
        original = getattr(Parser, method)

        def parse(self: Parser, argv: list[str]) -> Namespace:
            if "compare" in self.prog:
                return original(self, argv)
            raise Parsed(original(self, argv))

        return parse

    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(Parser, method, ending(method))


def command_lines(page: Path) -> Iterator[str]:
    """The command lines of a page: in blocks of code without a language, and in backticks."""
    for block in blocks(page, ""):
        yield from (line for line in block.splitlines() if COMMAND.match(line))
    yield from (span for span in spans(page) if COMMAND.match(span))


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
@pytest.mark.usefixtures("only_parsed")
def test_command_lines_are_understood(page: Path) -> None:
    for line in command_lines(page):
        check(shlex.split(line, comments=True))


@pytest.mark.usefixtures("only_parsed")
@pytest.mark.parametrize(
    "line",
    [
        "appo trian --task mnli",
        "appo train --tusk mnli",
        "appo train appo.kl_cof=0.1",
        "make train TUSK=mnli",
        "make trian",
        "appo prompt --run runs/x",
        'make train ARGS="promts=8"',
        "appo compare --arms ankor",
        "python -m experiments.trian",
    ],
)
def test_a_command_line_that_is_wrong_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check(shlex.split(line))


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_keys_that_are_named_exist(page: Path) -> None:
    keys = dotted_keys(RunConfig)
    for span in spans(page):
        if re.fullmatch(r"[a-z][\w.]*=[\w.-]+", span) and span != "key=value":
            build_config(assignments=[span])
        elif re.fullmatch(r"(appo|anchor|sampling|reward|examples)\.(?!py$)\w+", span):
            package, _, name = span.partition(".")
            assert span in keys or (package == "appo" and importlib.util.find_spec(f"appo.{name}")), span


# -- code ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the tutorial's run was made (a short one, on the lab), and the working folder of the tests."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("experiments", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my").mkdir()
    (spec,) = blocks(ROOT / "docs" / "tutorial.md", "yaml")
    (folder / "my" / "reviews.yaml").write_text(spec, encoding="utf-8")
    (rows,) = blocks(ROOT / "docs" / "tutorial.md", "json")
    shown = [json.loads(row) for row in rows.splitlines()]
    more = [row | {"body": f"{row['body']} {i}"} for i in range(40) for row in shown]
    (folder / "my" / "reviews.jsonl").write_text("\n".join(map(json.dumps, more)), encoding="utf-8")
    small = ["steps=1", "prompts=2", "pool=2", "examples.shots=3", "headroom=0", "threads=1"]
    models = ["--target", "experiments/lab/target", "sampling.max_new_tokens=8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train(["--task", "my/reviews.yaml", "--run", "runs/reviews", *small, *models]) == 0
        yield folder


@pytest.mark.parametrize("page", [page for page in WRITTEN if blocks(page, "python")], ids=lambda page: page.name)
def test_code_runs(page: Path, workplace: Path) -> None:
    """Blocks of a page share their names. One whose first line says that it needs something else is compiled only."""
    assert Path.cwd() == workplace
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks(page, "python"), 1):
        code = compile(block, f"{page.name}, block {number}", "exec")
        if not block.startswith("# needs "):
            exec(code, names)
    if page.name == "using-the-result.md":  # its two ways to choose a label word agree
        first = names["words"][names["logits"][names["first"]].argmax()]
        assert first == names["words"][names["probabilities"][0].argmax()]


def test_the_tutorials_commands_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks(["--show", "my/reviews.yaml"]) == 0
    assert "They were kind." in capsys.readouterr().out
    assert prompt(["--run", "runs/reviews", "--input", "They were kind.", "--answer"]) == 0
    assert "answer: " in capsys.readouterr().out
    assert workplace.joinpath("runs", "reviews", "report.html").is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name)
def test_specs_and_studies_are_sound(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        if page.name == "studies.md":
            assert list(Study.load(str(path)).cells(tmp_path, [0]))
        else:
            assert load_spec(str(path)).manual_prompt
