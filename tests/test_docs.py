"""The pages beside the models say what is there: files, names, options, defaults, numbers, code."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ffengine import cli, models
from ffengine.commands.options import model_options
from ffengine.commands.reproduce import chosen
from ffengine.commands.reproduction.tables import percent
from ffengine.models import recipe_files

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "ffengine" / "models"
PAGES = sorted(FOLDER.glob("*.md"))
OPTIONS, RECIPES = "| option | default | meaning |", "| recipe | table | accuracy, % |"
NETWORKS = "| model | what | parameters | recipe | on digits |"
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)


def papers() -> set[str]:
    """Modules that register models."""
    return {p.stem for p in FOLDER.glob("*.py")} - {
        "__init__", "registry", "recipe_files", "options"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def names(text: str) -> list[str]:
    """Models in backticks."""
    return re.findall(r"`((?:bp/)?[a-z]+/[a-z0-9-]+)`", text)


def tables(page: Path, header: str) -> Iterator[tuple[str, list[list[str]]]]:
    """(the heading above it, rows of cells) of every table with this header."""
    heading, lines = "", page.read_text().splitlines()
    for i, line in enumerate(lines):
        heading = line if line.startswith("#") else heading
        if line == header:
            rows = []
            for row in lines[i + 2:]:
                if not row.startswith("|"):
                    break
                rows.append([c.strip() for c in re.split(r"(?<!\\)\|", row)[1:-1]])
            yield heading, rows


def expanded(name: str) -> list[str]:
    """a-{b,c} -> a-b, a-c."""
    found = re.search(r"\{([^}]*)\}", name)
    if found is None:
        return [name]
    return [one for word in found[1].split(",")
            for one in expanded(name[:found.start()] + word + name[found.end():])]


def test_every_module_of_models_has_a_page() -> None:
    assert {p.stem for p in PAGES} == papers()


@pages
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"(?:ffengine|tests|kernels|csrc|bench)/[\w/.*-]*\w", page.read_text())
    missing = [n for n in named if not list(ROOT.glob(n)) and n not in models.names()]
    assert named and not missing


@pages
def test_models_that_a_page_names_exist(page: Path) -> None:
    found = names(page.read_text())
    assert found and not set(found) - set(models.names())


@pages
def test_options_and_defaults_are_those_of_the_builders(page: Path) -> None:
    told: dict[str, dict[str, Any]] = {}
    for heading, rows in tables(page, OPTIONS):
        assert names(heading), f"expected model names in the heading {heading!r}"
        for name in names(heading):
            for option, default, meaning in rows:
                assert meaning and option.strip("`") not in told.setdefault(name, {})
                told[name][option.strip("`")] = ast.literal_eval(default.strip("`"))
    wanted = set() if page.stem == "backprop" else {
        n for n in models.names() if n.startswith(f"{page.stem}/")}
    assert set(told) == wanted
    for name, options in told.items():
        assert {k: repr(v) for k, v in options.items()} == {
            k: repr(v) for k, v in models.entry(name).options().items()}


def in_words(recipe: models.Recipe) -> str:
    low = "" if recipe.lr_min is None else f" to {recipe.lr_min:g}"
    return (f"{recipe.optimizer} {recipe.lr:g}{low}, {recipe.epochs} epochs, "
            f"batch {recipe.batch_size}")


@pages
def test_networks_and_their_recipes_are_those_of_the_registry(page: Path) -> None:
    told, wanted = [], []
    for _, rows in tables(page, NETWORKS):
        for name, what, *cells in rows:
            entry = models.entry(name.strip("`"))
            with torch.device("meta"):
                count = sum(p.numel() for p in entry.build().parameters())
            small = ", ".join([in_words(entry.recipe_for("digits")), *(
                f"{k}={v}" for k, v in entry.options_for("digits").items())])
            told.append([name, *cells])
            wanted.append([name, f"{count / 1e6:.2f} M", in_words(entry.recipe), small])
            assert what
    assert told == wanted
    assert page.stem == "backprop" or {row[0].strip("`") for row in told} == {
        n for n in models.names() if n.startswith(f"{page.stem}/")}


@pages
def test_numbers_are_those_of_the_recipes(page: Path) -> None:
    for _, rows in tables(page, RECIPES):
        for pattern, table, accuracy in rows:
            found = [recipe_files.load(name) for name in expanded(pattern.strip("`"))]
            assert {f.table for f in found} == {table}
            assert accuracy == " / ".join(
                percent(f.paper_result.mean, f.paper_result.sd) for f in found)


def test_every_recipe_is_on_some_page() -> None:
    told = [name for page in PAGES for _, rows in tables(page, RECIPES)
            for pattern, *_ in rows for name in expanded(pattern.strip("`"))]
    assert set(told) == set(recipe_files.names())


@pages
def test_commands_of_a_page_are_known(page: Path) -> None:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    assert lines
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        assert program == "ffengine"
        args = cli.parser().parse_args(words)
        if args.command == "reproduce":
            assert chosen(args.recipe)
        else:
            assert args.model in models.names()
            model_options(args.model, args.options)


@pages
def test_code_of_a_page_runs(page: Path) -> None:
    torch.manual_seed(0)
    code = blocks(page, "python")
    assert code
    for block in code:
        exec(compile(ast.parse(block), page.name, "exec"), {})
