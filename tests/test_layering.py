"""Which module may import which, and which may touch the outside world, checked on the syntax trees."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("appo", "rewards", "tasks", "experiments")
BELOW = ("appo", "rewards", "tasks")
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
LIMIT = 400  # lines: "a file over about 400 lines is two files"
CORE_LIMIT = 1500  # lines of appo without appo/lm: what a reader of the algorithm has to read

# Which of the four packages may import which. From appo, rewards needs only appo.lm, which runs models.
MAY_IMPORT = {
    "appo": set(),
    "rewards": {"tasks", "appo.lm"},
    "tasks": set(),
    "experiments": {"appo", "rewards", "tasks"},
}
# Which of our own modules a room may import, besides itself and, in experiments, the packages below.
ROOMS = {
    "appo/lm": {"appo.functional"},
    "experiments/config": set(),
    "experiments/hub": {"experiments.config", "experiments.run"},
    "experiments/terminal": set(),
    "experiments/run": {"experiments.config"},
    "experiments/arms": {"experiments.config", "experiments.run"},
    "experiments/diagnostics": {"experiments.config", "experiments.run", "experiments.arms"},
    "experiments/page": {
        "experiments.config",
        "experiments.run",
        "experiments.terminal",
        "experiments.diagnostics",
    },
    "experiments/planning": {"experiments.config", "experiments.run", "experiments.terminal"},
    "experiments/tuning": {
        "experiments.config",
        "experiments.run",
        "experiments.arms",
        "experiments.diagnostics",
        "experiments.terminal",
        "experiments.page",
        "experiments.planning",
    },
    "experiments/lab": {"experiments.config", "experiments.run", "experiments.terminal"},
    "experiments/bench": {"experiments.config", "experiments.run", "experiments.terminal", "experiments.lab"},
}
# Outside packages, and the places that may import them. A place is a package or a file.
PLACES = {
    "transformers": {"appo/lm", "experiments"},
    "datasets": {"tasks"},
    "pyarrow": {"tasks"},
    "yaml": {"experiments", "tasks/catalogue.py"},  # the catalogue reads the specs
    "argparse": {"experiments"},
    "tqdm": {"experiments/compare.py", "experiments/lab", "experiments/terminal"},
    "torch": {"appo", "rewards", "experiments"},
    "httpx2": {"rewards/connection.py"},
    "httpx": {"rewards/connection.py"},  # what huggingface_hub brought along before httpx2
    "tokenizers": {"experiments/lab"},
    "gguf": {"experiments/weights.py"},  # an extra
    "peft": {"appo/lm/adapter.py", "experiments/run/models.py"},  # an extra
    "wandb": {"experiments/run/loggers.py"},  # an extra
    "huggingface_hub": {"experiments/hub/upload.py"},
    "numpy": {"experiments/run/statistics.py"},
}


def package(path: str) -> str:
    return path.partition("/")[0]


def room(path: str) -> str:
    """The folder of a file within its package; rooms within a room count as that room."""
    return "/".join(path.split("/")[:-1][:2])


def imports(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every import, also inside functions; the name is empty for `import module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call, with the source of what is called: print, Path("a").open, torch.load."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def given(call: ast.Call, name: str) -> object:
    """The constant passed for a keyword of a call; None if there is none."""
    return next((getattr(k.value, "value", None) for k in call.keywords if k.arg == name), None)


# -- rules: each yields what is wrong with a file --------------------------------------------------------------


def wrong_rank(path: str, source: str) -> Iterator[str]:
    """Imports of one of our packages by another that may not import it."""
    allowed = MAY_IMPORT[package(path)] | {package(path)}
    for module, name in imports(source):
        other = module.split(".")[0]
        within = {other, ".".join(module.split(".")[:2]), f"{module}.{name}"}
        if other in PACKAGES and not within & allowed:
            yield f"imports {module}"


def wrong_room(path: str, source: str) -> Iterator[str]:
    """Imports by a room of modules beside or above it that it may not use."""
    if room(path) not in ROOMS:
        return
    allowed = ROOMS[room(path)] | {room(path).replace("/", ".")}
    for module, name in imports(source):
        inside = {".".join(module.split(".")[:2]), f"{module}.{name}"}
        if package(module.replace(".", "/")) == package(path) and not inside & allowed:
            yield f"imports {module}"


def relative_import(_path: str, source: str) -> Iterator[str]:
    """Relative imports, which the other rules would not see."""
    yield from (f"imports {module}" for module, _ in imports(source) if module.startswith("."))


def more_than_example(path: str, source: str) -> Iterator[str]:
    """Imports of rewards from tasks, besides tasks.spec.Example."""
    for module, name in imports(source):
        of_tasks = package(path) == "rewards" and package(module.replace(".", "/")) == "tasks"
        if of_tasks and (module, name) != ("tasks.spec", "Example"):
            yield f"imports {module} {name}"


def outside_package(path: str, source: str) -> Iterator[str]:
    """Outside packages where they may not be used, or that are not among the dependencies."""
    for module, _ in imports(source):
        name = module.split(".")[0]
        known = name in sys.stdlib_module_names or name in PACKAGES or module.startswith(".")
        if name in PLACES and not {path, package(path), room(path)} & PLACES[name]:
            yield f"imports {module}"
        elif name not in PLACES and not known:
            yield f"imports {module}, which is no dependency"


BUILTINS = {"print", "open", "input", "exec", "eval", "breakpoint"}
READING = {"open", "read_text", "read_bytes"}
WRITING = {"write_text", "write_bytes", "mkdir", "unlink", "rename", "touch"}


def outside_world(path: str, source: str) -> Iterator[str]:
    """Printing, files and the environment below experiments; tasks may read data files."""
    if package(path) not in BELOW:
        return
    methods = WRITING if package(path) == "tasks" else WRITING | READING
    for name, _ in calls(source):
        if name in BUILTINS or ("." in name and name.split(".")[-1] in methods):
            yield f"calls {name}"
    # The environment is in os, the terminal in sys; nothing else of either is needed there.
    yield from (f"imports {module}" for module, _ in imports(source) if module in ("os", "sys", "io"))


def open_for_writing(path: str, source: str) -> Iterator[str]:
    """A file that is opened below experiments in any mode but reading."""
    for name, call in calls(source):
        if package(path) in BELOW and name.endswith(".open"):
            modes = {getattr(argument, "value", None) for argument in call.args} | {given(call, "mode") or "r"}
            if not modes <= {"r", "rb"}:
                yield f"line {call.lineno} opens a file for writing"


def star_import(_path: str, source: str) -> Iterator[str]:
    yield from (f"imports * from {module}" for module, name in imports(source) if name == "*")


def bare_except(_path: str, source: str) -> Iterator[str]:
    """`except:` and `except BaseException`, which swallow a Ctrl-C."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and (
            node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "BaseException")
        ):
            yield f"line {node.lineno} catches everything"


def unsafe_loading(_path: str, source: str) -> Iterator[str]:
    """Pickles, torch.load that would open one, and YAML that would run code."""
    yield from (f"imports {module}" for module, _ in imports(source) if module in ("pickle", "dill", "shelve"))
    for name, call in calls(source):
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            yield f"line {call.lineno} calls {name}"
        if name == "torch.load" and given(call, "weights_only") is not True:
            yield f"line {call.lineno} calls torch.load without weights_only=True"


FACTORIES = {
    "tensor",
    "as_tensor",
    "linspace",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "randint",
    "randperm",
    "eye",
}


def no_device(path: str, source: str) -> Iterator[str]:
    """A new tensor without an explicit device: right on a CPU, and wrong on the first machine with a GPU."""
    for name, call in calls(source):
        new = name.removeprefix("torch.") in FACTORIES and name.startswith("torch.")
        if package(path) in ("appo", "rewards") and new and "device" not in {k.arg for k in call.keywords}:
            yield f"line {call.lineno} calls {name} without a device"


def no_docstring(_path: str, source: str) -> Iterator[str]:
    """Modules with code, and their public functions and classes, that have no docstring."""
    tree = ast.parse(source)
    if tree.body and not ast.get_docstring(tree):
        yield "the module has no docstring"
    for node in tree.body:
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):
            yield f"{node.name} has no docstring"


def too_long(_path: str, source: str) -> Iterator[str]:
    count = len(source.splitlines())
    if count > LIMIT:
        yield f"{count} lines"


RULES: tuple[Callable[[str, str], Iterator[str]], ...] = (
    wrong_rank,
    wrong_room,
    relative_import,
    more_than_example,
    outside_package,
    outside_world,
    open_for_writing,
    star_import,
    bare_except,
    unsafe_loading,
    no_device,
    no_docstring,
    too_long,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule: Callable[[str, str], Iterator[str]]) -> None:
    assert [f"{path}: {fault}" for path, source in SOURCES.items() for fault in rule(path, source)] == []


# A file that breaks each rule: a rule that sees nothing would pass for ever.
FAULTS = [
    (wrong_rank, "appo/x.py", "from tasks.spec import Example"),
    (wrong_rank, "appo/x.py", "import rewards.reward"),
    (wrong_rank, "appo/x.py", "def f():\n    import experiments.config"),
    (wrong_rank, "rewards/x.py", "from appo.policy import Policy"),
    (wrong_rank, "tasks/x.py", "from rewards.reward import RewardResult"),
    (wrong_rank, "tasks/x.py", "import experiments"),
    (wrong_rank, "appo/lm/x.py", "from rewards.target import fill"),
    (wrong_rank, "rewards/x.py", "from appo import Policy"),
    (wrong_room, "appo/lm/x.py", "from appo.policy import Policy"),
    (wrong_room, "appo/lm/x.py", "from appo import rollout"),
    (wrong_room, "experiments/run/x.py", "from experiments.arms.arm import Arm"),
    (wrong_room, "experiments/arms/x.py", "from experiments.terminal.console import Progress"),
    (wrong_room, "experiments/config/x.py", "import experiments.train"),
    (relative_import, "appo/x.py", "from ..tasks import spec"),
    (more_than_example, "rewards/x.py", "from tasks.spec import Example, TaskSpec"),
    (more_than_example, "rewards/x.py", "import tasks.spec"),
    (more_than_example, "rewards/x.py", "from tasks.splits import Example"),
    (outside_package, "appo/trainer.py", "import transformers"),
    (outside_package, "appo/policy.py", "import transformers"),
    (outside_package, "rewards/local.py", "from transformers import AutoModel"),
    (outside_package, "experiments/arms/x.py", "from tqdm import tqdm"),
    (outside_package, "experiments/x.py", "import numpy"),
    (outside_package, "rewards/x.py", "import datasets"),
    (outside_package, "experiments/x.py", "from datasets import load_dataset"),
    (outside_package, "tasks/sources.py", "import yaml"),
    (outside_package, "tasks/x.py", "import torch"),
    (outside_package, "appo/x.py", "import argparse"),
    (outside_package, "rewards/x.py", "from tqdm import tqdm"),
    (outside_package, "appo/x.py", "import trl"),
    (outside_world, "appo/x.py", "print(1)"),
    (outside_world, "rewards/x.py", "with open('a') as f: pass"),
    (outside_world, "rewards/x.py", "Path('a').read_text()"),
    (outside_world, "tasks/x.py", "import os\nos.environ['A']"),
    (outside_world, "tasks/x.py", "from os import environ"),
    (outside_world, "tasks/x.py", "path.write_text('a')"),
    (outside_world, "appo/x.py", "from sys import stderr"),
    (open_for_writing, "tasks/x.py", "path.open('w')"),
    (open_for_writing, "tasks/x.py", "path.open(mode='a')"),
    (star_import, "experiments/x.py", "from os.path import *"),
    (bare_except, "experiments/x.py", "try: pass\nexcept: pass"),
    (bare_except, "experiments/x.py", "try: pass\nexcept BaseException: pass"),
    (unsafe_loading, "experiments/x.py", "import pickle"),
    (unsafe_loading, "experiments/x.py", "torch.load('a')"),
    (unsafe_loading, "experiments/x.py", "torch.load('a', weights_only=False)"),
    (unsafe_loading, "tasks/x.py", "yaml.load(text)"),
    (no_device, "appo/x.py", "torch.randperm(3, generator=g)"),
    (no_device, "appo/lm/x.py", "torch.zeros(2)"),
    (no_device, "rewards/x.py", "torch.as_tensor([1.0])"),
    (no_docstring, "appo/x.py", "import torch"),
    (no_docstring, "appo/x.py", "'''Module.'''\ndef f(): pass"),
    (no_docstring, "appo/x.py", "'''Module.'''\nclass C: pass"),
    (too_long, "appo/x.py", "\n" * 401),
]


@pytest.mark.parametrize(("rule", "path", "source"), FAULTS)
def test_every_rule_sees_its_fault(rule: Callable[[str, str], Iterator[str]], path: str, source: str) -> None:
    assert list(rule(path, source)) != []


def test_every_rule_has_a_fault_that_it_sees() -> None:
    assert {rule for rule, *_ in FAULTS} == set(RULES)


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "misc"])
def test_no_module_is_a_drawer_for_everything(name: str) -> None:
    assert [path for path in SOURCES if Path(path).stem == name] == []


def test_all_four_packages_are_read() -> None:
    assert {package(path) for path in SOURCES} == set(PACKAGES)


def test_every_room_has_its_rule() -> None:
    assert {room(path) for path in SOURCES} == set(PACKAGES) | set(ROOMS)


def test_the_algorithm_can_be_read_in_one_sitting() -> None:
    core = [source for path, source in SOURCES.items() if room(path) == "appo"]
    assert sum(source.count("\n") for source in core) < CORE_LIMIT
