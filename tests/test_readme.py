"""What README.md and docs/ tell people to write does run, and what they name is there."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import ffengine as ff
from ffengine import cli, models
from ffengine.commands.reproduce import chosen
from ffengine.engine.execute import HOME
from ffengine.engine.memory.meter import KINDS
from ffengine.engine.schedules.schedule import Schedule
from ffengine.models import recipe_files
from ffengine.ops.config import LocalPassConfig
from ffengine.ops.local_pass import local_pass
from tests.test_docs import blocks, expanded, tables

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
#: docs/reproduction.md is written by a command.
GUIDES = [README, *(p for p in sorted(DOCS.glob("*.md")) if p.stem != "reproduction")]
#: Pictures and tables of measured results stand between marks, and are the generator's.
TEXTS = {p: re.sub(r"<!-- results:.*?:end -->", "", p.read_text(), flags=re.DOTALL) for p in GUIDES}
BLOCKS = [block for page in GUIDES for block in blocks(page, "python")]
TERMS = "| term | meaning | defined by |"
guides = pytest.mark.parametrize("page", GUIDES, ids=lambda p: p.stem)
#: A word of each block that has a test of its own.
TESTED = ("memory_budget", "equivalent_to_local_pass", "label_smoothing", "ff.data.splits",
          'Norm("length"', "found.z is a")


def block(word: str) -> str:
    (found,) = (b for b in BLOCKS if word in b)
    return found


def others(page: Path) -> list[str]:
    """Blocks of a page that have no test of their own."""
    return [b for b in blocks(page, "python") if not any(word in b for word in TESTED)]


@pytest.mark.parametrize("page", [p for p in GUIDES if others(p)], ids=lambda p: p.stem)
def test_other_blocks_run_in_their_order(page: Path) -> None:
    """With what a reader has by then: a network, its trainer, loaders."""
    splits = ff.data.load("synthetic", shape=(1, 28, 28), train=64, valid=32, test=8)
    train, valid = (ff.data.loader(s, batch_size=32) for s in (splits.train, splits.valid))
    net = models.create("sn/mlp", layers=(20, 20))
    trainer = ff.Trainer(net, epochs=1, lr=0.01, batch_size=32, progress=False)
    names = {"net": net, "trainer": trainer, "train_loader": train, "valid_loader": valid}
    for code in others(page):
        exec(code, names)


def test_own_loss() -> None:
    names: dict[str, Any] = {}
    exec(block("label_smoothing"), names)
    net = ff.nn.LocalNet([names["layer"]], num_classes=10, in_shape=(3, 8, 8))
    report = ff.Trainer(net, epochs=1, progress=False).step(
        torch.randn(4, 3, 8, 8), torch.tensor([0, 3, 9, 1]))
    assert torch.isfinite(report.losses[0])


def test_own_data() -> None:
    samples = torch.utils.data.TensorDataset(torch.rand(40, 1, 8, 8), torch.arange(40) % 4)
    names: dict[str, Any] = {"ff": ff, "train_set": samples, "test_set": samples}
    exec(block("ff.data.splits"), names)
    assert [len(names[part].image_set) for part in ("train", "valid", "test")] == [36, 4, 40]


def test_own_layer() -> None:
    splits = ff.data.load("synthetic", shape=(1, 28, 28), train=32, valid=8, test=8)
    train, valid = (ff.data.loader(s, batch_size=8) for s in (splits.train, splits.valid))
    code = block("Norm(\"length\"").replace("lr=0.01", "lr=0.01, progress=False")
    names: dict[str, Any] = {"train_loader": train, "valid_loader": valid}
    exec(code, names)
    assert names["net"](torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_the_face() -> None:
    code = block("memory_budget").replace("trainer.fit(train_loader, valid_loader)", "pass")
    names: dict[str, Any] = {"x": torch.randn(2, 3, 32, 32), "y": torch.tensor([1, 2])}
    exec(code, names)
    assert names["scores"].shape == (2, 10)


def test_an_op_by_itself() -> None:
    exec(block("found.z is a"), {})


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_local_pass_is_what_the_readme_says(backend: str) -> None:
    names: dict[str, Any] = {}
    exec(block("equivalent_to_local_pass"), names)
    torch.manual_seed(0)
    dtype = torch.float64 if backend == "reference" else torch.float32
    a, y = torch.randn(6, 20, 5, 4, dtype=dtype), torch.arange(6) % 4
    told = names["equivalent_to_local_pass"](a, y, 4)
    made = local_pass(a, y, config=LocalPassConfig(groups=4), want_da=True, backend=backend)
    near = {"rtol": 1e-9, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-4,
                                                                         "atol": 1e-6}
    for one, other in zip(told, (made.z, made.g, made.loss, made.da), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(other, one, **near)


def test_the_readme_fits_a_screen_or_two() -> None:
    assert len(README.read_text().splitlines()) <= 130


def test_the_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "README.md").read_text()))
    assert linked == {p.name for p in DOCS.glob("*.md")} - {"README.md"}


@guides
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
             if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@guides
def test_files_that_a_guide_names_exist(page: Path) -> None:
    named = re.findall(r"(?:ffengine|bench|csrc|kernels|tests|docs)/[\w/.-]*\.\w+", TEXTS[page])
    missing = [n for n in named if not (ROOT / n).exists()
               and not n.endswith(("X.py", "docs/reproduction.md"))]
    assert missing == []


@guides
def test_models_that_a_guide_names_exist(page: Path) -> None:
    families = "|".join(sorted({n.split("/")[-2] for n in models.names()}))
    named = re.findall(rf"(?:bp/)?(?:{families})/[a-z0-9-]+(?![\w{{.-])", TEXTS[page])
    assert set(named) <= set(models.names())


@guides
def test_commands_of_a_guide_are_known(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    for line in lines:
        program, *words = shlex.split(line.partition(" > ")[0], comments=True)
        if program == "torchrun":
            program, words = "ffengine", words[words.index("ffengine") + 1:]
        if program == "ffengine":
            args = cli.parser().parse_args(words)
            if args.command == "reproduce":
                assert not args.recipe or chosen(args.recipe)
            elif args.command == "bench":
                assert (ROOT / "bench" / f"{args.suite}.py").exists()
            else:
                assert getattr(args, "model", None) in (None, *models.names())
        elif program == "make":
            given = [word.partition("=")[0] for word in words if "=" in word]
            assert {word for word in words if "=" not in word} <= set(targets)
            assert all(f"$({name})" in makefile or f"$(if $({name})" in makefile for name in given)
        else:
            assert (program, words[0]) in (("pip", "install"), ("bash", "bench/gpu.sh"))


def test_every_model_stands_in_its_table() -> None:
    told = [name.strip("`") for pattern, *_ in rows(
        "models.md", "| models | paper | what trains them |") for word in pattern.split("`, `")
        for name in expanded(word)]
    assert sorted(told) == sorted(
        [*(n for n in models.names() if not n.startswith("bp/")), "bp/<any of these>"])


def test_guides_count_the_recipes() -> None:
    counts = [int(n) for text in TEXTS.values() for n in re.findall(r"(\d+) recipes", text)]
    assert counts and set(counts) == {len(recipe_files.names())}


def test_modules_that_guides_run_exist() -> None:
    named = {m for text in TEXTS.values() for m in re.findall(r"python -m (bench[\w.]*)", text)}
    missing = [m for m in named if not (ROOT / m.replace(".", "/")).with_suffix(".py").exists()]
    assert named and missing == []


def rows(page: str, header: str) -> list[list[str]]:
    """Cells of every table with this header."""
    found = [[cell.strip("`") for cell in row]
             for _, table in tables(DOCS / page, header) for row in table]
    assert found
    return found


def named(path: str) -> Any:
    """A module, or what a dotted path leads to inside one."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"no module {path}")


@pytest.mark.parametrize("row", rows("glossary.md", TERMS), ids=lambda row: row[0])
def test_a_term_is_what_the_code_calls_it(row: list[str]) -> None:
    term, meaning, where = row
    found = named(where)
    text = found if isinstance(found, tuple) else inspect.getdoc(found)
    said = re.sub("[-_]", "", f"{where} {text}".lower())
    assert meaning and [word for word in term.lower().replace("-", "").split()
                        if re.sub("s$", "", word) not in said] == []


def kinds_of(base: type) -> set[str]:
    """Names of the package's classes below it."""
    mine = [c for c in base.__subclasses__() if c.__module__.startswith("ffengine.")]
    return {c.__name__ for c in mine}.union(*map(kinds_of, mine))


def test_no_schedule_and_no_kind_of_memory_is_left_out() -> None:
    terms = {term for term, *_ in rows("glossary.md", TERMS)}
    assert {name.lower() for name in kinds_of(Schedule)} <= terms
    told = {name for name, *_ in rows("schedules.md", "| schedule | whose turn | who uses it |")}
    assert told == kinds_of(Schedule) - {"Backprop"}
    text = (DOCS / "glossary.md").read_text().lower() + (DOCS / "budgets.md").read_text().lower()
    assert all(kind in text for kind in KINDS)


def test_every_instruction_is_told() -> None:
    told = [name for name, _ in rows("schedules.md", "| instruction | what it does |")]
    assert sorted(told) == sorted(HOME)


def test_the_printed_program_is_the_one_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "deeperforward/tinycnn", "--steps", "--costs", "modelled"]
    assert cli.main(command) == 0
    printed = [re.sub(r"\s+(live after it|[\d.]+ [kM]B)$", "", line)
               for line in capsys.readouterr().out.splitlines()]
    (told,) = re.findall(r"```\n(epoch 0:.*?)\n```", (DOCS / "schedules.md").read_text(), re.DOTALL)
    assert told.splitlines() == printed[printed.index(told.splitlines()[0]):]
