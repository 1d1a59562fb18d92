"""The regression gate catches a planted regression of each kind and refuses what it cannot compare.

Counters first as files, then planted in the running code; time in a copy of the tree whose code
was made slower, wrong, or deadly.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import base, compare, counters, declared, gate, machine_code, results, steps, timing
from ffengine.engine import execute, sweep
from ffengine.ops import local_pass as op

ROOT = Path(__file__).parents[2]
KERNEL = {"registers": 40, "shared": 16, "spills": 0, "loads": 4, "loads_16": 4, "stores": 3,
          "stores_16": 0}
PARTS: dict[str, Any] = {
    "memory": {"needs": {"processor": "x", "torch": "2"}, "rows": {
        "net": {"peak_bytes": 1000, "scratch": 10, "planned_bytes": 1000}}},
    "launches": {"needs": {"torch": "2"}, "rows": {"net": {"kernels": 7, "library_ops": 5}}},
    "bytes_moved": {"needs": {}, "rows": {"local_pass": {"bytes": 64}}},
    "triton": {"needs": {"triton": "3"}, "rows": {"sm_80 stats_kernel": dict(KERNEL)}},
    "nvcc": {"needs": {"nvcc": "V13"}, "rows": {"sm_80 sweep": dict(KERNEL)}},
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / f"{name}.json" for name in ("base", "head")}
    for path in found.values():
        counters.write(path, copy.deepcopy(PARTS))
    return found


def rewritten(path: Path, **changes: Any) -> None:
    """Other contents under a checksum that fits them."""
    content = json.loads(path.read_text()) | changes
    content["checksum"] = results.checksum(content)
    path.write_text(json.dumps(content))


def run(files: dict[str, Path], *flags: str) -> int:
    return compare.main([str(files["base"]), str(files["head"]), *flags])


def test_equal_files_are_silent(files: dict[str, Path]) -> None:
    assert run(files) == 0


@pytest.mark.parametrize(("part", "row", "counter", "value"), [
    ("memory", "net", "peak_bytes", 1001), ("memory", "net", "peak_bytes", 999),
    ("memory", "net", "scratch", 11), ("memory", "net", "planned_bytes", 1001),
    ("launches", "net", "kernels", 8), ("launches", "net", "library_ops", 6),
    ("bytes_moved", "local_pass", "bytes", 65),
    *((part, row, counter, KERNEL[counter] + 1)
      for part, row in (("triton", "sm_80 stats_kernel"), ("nvcc", "sm_80 sweep"))
      for counter in ("registers", "spills", "shared", "loads_16")),
])
def test_a_counter_that_moved(part: str, row: str, counter: str, value: int,
                              files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    parts = copy.deepcopy(PARTS)
    before = parts[part]["rows"][row][counter]
    parts[part]["rows"][row][counter] = value
    counters.write(files["head"], parts)
    assert run(files) == 1
    assert capsys.readouterr().out == f"{part}: {row}: {counter} {before} -> {value}\n"


def test_rows_that_come_go_or_fail(files: dict[str, Path],
                                   capsys: pytest.CaptureFixture[str]) -> None:
    parts = copy.deepcopy(PARTS)
    parts["memory"]["rows"] = {"other": {"failed": "ValueError: no"}}
    counters.write(files["head"], parts)
    assert run(files) == 1
    out = capsys.readouterr().out
    for text in ("memory: net: gone", "memory: other: new, not in the baseline",
                 "memory: other: failed: ValueError: no"):
        assert text in out.splitlines()


def test_a_row_that_always_failed_is_red_too(files: dict[str, Path]) -> None:
    parts = copy.deepcopy(PARTS)
    parts["memory"]["rows"]["net"] = {"failed": "ValueError: no"}
    for path in files.values():
        counters.write(path, parts)
    assert run(files) == 1


def test_renew_takes_the_new_file(files: dict[str, Path],
                                  capsys: pytest.CaptureFixture[str]) -> None:
    parts = copy.deepcopy(PARTS)
    parts["launches"]["rows"]["net"]["kernels"] = 9
    counters.write(files["head"], parts)
    assert run(files, "--renew") == 0
    assert "kernels 7 -> 9" in capsys.readouterr().out
    assert run(files) == 0


@pytest.mark.parametrize(("facts", "said"), [
    ({}, "kernels 7 -> 9"),
    ({"version": "0.0.1"}, "is of ffengine 0.0.1, expected")])
def test_a_new_machine_leaves_the_others_baseline(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        facts: dict[str, Any], said: str) -> None:
    parts = copy.deepcopy(PARTS)
    parts["launches"]["rows"]["net"]["kernels"] = 9
    monkeypatch.setattr(compare, "BASELINES", tmp_path)
    monkeypatch.setattr(counters, "collect", lambda device: parts)
    theirs = tmp_path / "another-machine.json"
    counters.write(theirs, PARTS)
    rewritten(theirs, **facts)
    before = theirs.read_bytes()
    assert compare.main(["--renew"]) == 0
    assert said in capsys.readouterr().out and theirs.read_bytes() == before
    assert results.read(compare.own_baseline(), kind="counters")["parts"] == parts


def other_compiler(head: Path) -> None:
    parts = copy.deepcopy(PARTS)
    parts["triton"]["needs"] = {"triton": "4"}
    counters.write(head, parts)


def no_nvcc(head: Path) -> None:
    counters.write(head, PARTS | {"nvcc": {"needs": {}, "absent": "built without CUDA kernels"}})


@pytest.mark.parametrize(("plant", "reason"), [
    (lambda head: rewritten(head, version="9.9"), "is of ffengine 0.1.0, expected 9.9: not comp"),
    (lambda head: rewritten(head, format=9), "expected format 1, got 9"),
    (lambda head: rewritten(head, kind="fair"), "expected kind counters, got 'fair'"),
    (lambda head: rewritten(head, machine={"class": "z80"}), "machine class 'z80', this one is"),
    (lambda head: head.write_text(head.read_text().replace("1000", "1001")), "edited by hand"),
    (lambda head: head.write_text("{"), "expected a result file"),
    (other_compiler, "triton: the baseline is of triton 3, this is 4: not compared"),
    (no_nvcc, "nvcc: this run: built without CUDA kernels: not compared"),
], ids=["version", "format", "kind", "machine", "checksum", "json", "compiler", "absent"])
def test_refused_with_the_reason(plant: Any, reason: str, files: dict[str, Path],
                                 capsys: pytest.CaptureFixture[str]) -> None:
    plant(files["head"])
    assert run(files) == 2
    said = capsys.readouterr()
    assert reason in said.err and said.err.count("\n") == 1 and not said.out


def held(path: Path, parts: dict[str, Any]) -> gate.Verdict:
    """The gate's word on a tree's counters."""
    verdict = gate.Verdict()
    gate.gate_counters(path, parts, verdict)
    return verdict


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any]]:
    """(this tree's counters, the baseline's commit's) on a machine of another class, which has no
    CUDA compiler."""
    head = copy.deepcopy(PARTS)
    head["memory"]["needs"] = {"processor": "y", "torch": "2"}
    head["nvcc"] = {"needs": {}, "absent": "built without CUDA kernels"}
    there = copy.deepcopy(head)
    asked: list[list[str]] = []

    def count(tree: Path, names: list[str], device: str) -> dict[str, Any]:
        asked.append(names)
        assert asked == [["memory", "nvcc"]]  # what can be compared as it is, is not counted again
        return {name: there[name] for name in names}

    monkeypatch.setattr(base, "baseline_ref", lambda: "abc")
    monkeypatch.setattr(base, "tree", lambda ref, cuda: (Path(), ref))
    monkeypatch.setattr(gate, "count_in", count)
    return head, there


def test_on_another_machine_the_baselines_commit_is_counted(
        files: dict[str, Path], elsewhere: tuple[dict[str, Any], dict[str, Any]]) -> None:
    head, _ = elsewhere
    verdict = held(files["base"], head)
    assert verdict.word == "pass" and not verdict.skipped
    (said,) = verdict.lines(strict=True)
    assert said.startswith("bench-gate: pass: nothing moved; compared launches with base.json; ")
    assert "memory with commit abc, counted here; not compared nothing" in said


def test_a_planted_byte_is_red_on_another_machine(
        files: dict[str, Path], elsewhere: tuple[dict[str, Any], dict[str, Any]]) -> None:
    head, _ = elsewhere
    head["memory"]["rows"]["net"]["scratch"] = 11
    verdict = held(files["base"], head)
    assert verdict.lines(strict=False)[1:] == ["RED memory: net: scratch 10 -> 11 bytes"]
    assert verdict.markdown(strict=False).startswith("# fail\n\n## moved\n\n- RED memory: net")


def test_a_base_that_cannot_run_a_case_is_never_green(
        files: dict[str, Path], elsewhere: tuple[dict[str, Any], dict[str, Any]]) -> None:
    head, there = elsewhere
    there["memory"]["rows"]["net"] = {"failed": "no such option"}
    verdict = held(files["base"], head)
    assert verdict.word == "inconclusive" and not verdict.red
    assert verdict.skipped == ["memory: net: commit abc, counted here could not run it: no such "
                               "option"]
    assert [line[:20] for line in verdict.lines(strict=True)] == ["bench-gate: fail: no",
                                                                "RED memory: net: com"]


def test_what_cannot_be_compared_is_said_and_red_if_strict(
        files: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    parts = copy.deepcopy(PARTS)
    parts["triton"]["needs"], parts["triton"]["rows"] = {"triton": "4"}, {}
    parts["launches"]["rows"]["net"]["kernels"] = 8

    def nowhere() -> str:
        raise base.NoBase("no commit here wrote bench/baselines (a shallow clone?)")

    monkeypatch.setattr(base, "baseline_ref", nowhere)
    verdict = held(files["base"], parts)
    assert verdict.red == ["launches: net: kernels 7 -> 8"]
    assert "skipped triton: the committed baseline is of another machine or compiler, and its " \
        "commit cannot be counted here: no commit here wrote" in capsys.readouterr().out
    assert [len(verdict.lines(strict)) for strict in (False, True)] == [2, 3]


def test_the_commits_that_counters_and_time_are_held_to(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BENCH_BASE", raising=False)

    def git(*words: str) -> str:
        return base.git("-c", "user.name=a", "-c", "user.email=a@b", *words, root=tmp_path).strip()

    def commit(name: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
        git("add", "-A")
        git("commit", "-qm", name)
        return git("rev-parse", "HEAD")

    git("init", "-qb", "main")
    with pytest.raises(base.NoBase, match="no commit here wrote bench/baselines"):
        commit("first")
        base.baseline_ref(tmp_path)
    written = commit("bench/baselines/one.json")
    left = commit("second")
    assert base.baseline_ref(tmp_path) == written  # a leak two commits old is not the norm
    assert base.default_ref(tmp_path) == "HEAD^"
    (tmp_path / "second").write_text("changed")
    assert base.default_ref(tmp_path) == "HEAD"
    git("checkout", "-qb", "branch")
    commit("third")
    commit("fourth")
    assert base.default_ref(tmp_path) == left


def test_the_gate_refuses_a_baseline_of_another_version(files: dict[str, Path]) -> None:
    rewritten(files["base"], version="0.0.1")
    with pytest.raises(ValueError, match=r"is of ffengine 0\.0\.1, expected .*: not compared"):
        held(files["base"], PARTS)


def counted() -> steps.Row:
    return steps.counted("deeperforward/tinycnn", 4, {"precision": "fp32"},
                         {"image_size": 8, "in_channels": 1, "widths": (10, 20, 20, 20)})


def moved(before: steps.Row, after: steps.Row) -> list[str]:
    return [text for part in before for text in compare.differences(
        {"rows": {part: before[part]}}, {"rows": {part: after[part]}})]


def test_counting_a_step_twice_gives_the_same() -> None:
    first = counted()
    assert first["memory"]["planned_bytes"] > 0 and first["launches"]["kernels"] > 0
    assert not moved(first, counted())


def test_planted_bytes_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    before, plain = counted(), execute.layer_turn

    def wasteful(*arguments: Any, **named: Any) -> None:
        kept = torch.empty(100_000)
        plain(*arguments, **named)
        del kept

    monkeypatch.setattr(execute, "layer_turn", wasteful)
    found = moved(before, counted())
    assert any("peak_bytes" in text for text in found), found


def test_planted_launch_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    before, plain = counted(), sweep.local_pass

    def twice(a: torch.Tensor, *rest: Any, **named: Any) -> Any:
        plain(a.clone(), *rest, **{**named, "out": None, "da_out": None})
        return plain(a, *rest, **named)

    monkeypatch.setattr(sweep, "local_pass", twice)
    found = moved(before, counted())
    assert any("kernels" in text for text in found), found


def test_planted_declaration(monkeypatch: pytest.MonkeyPatch) -> None:
    before, plain = dict(declared.moved()), op.bytes_moved
    monkeypatch.setattr(op, "bytes_moved", lambda *a, **k: plain(*a, **k) + 4)
    found = list(compare.differences({"rows": before}, {"rows": dict(declared.moved())}))
    assert found and all(text.startswith("local_pass") for text in found)


PLANTED_IN_THE_COMPILER = """
import json, sys
from triton.runtime import JITFunction
from bench import aot
plain, options = JITFunction.run, json.loads(sys.argv.pop())
def forced(self, *arguments, **named):
    return plain(self, *arguments, **{**named, **options})
JITFunction.run = forced
aot.main()
"""


def compiled(tmp_path: Path, **forced: int) -> dict[str, int]:
    """Counters of one Triton kernel for sm_80, compiled with options that a launch would not."""
    done = subprocess.run(
        [sys.executable, "-c", PLANTED_IN_THE_COMPILER, "80", "adamw", json.dumps(forced)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**counters.quiet_environment(), "TRITON_CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(done.stdout.splitlines()[-1])
    return {k: v for k, v in row.items() if k not in ("variant", "kernel")}


def test_planted_registers_spills_and_loads_of_a_kernel(tmp_path: Path) -> None:
    usual, starved, narrow = (compiled(tmp_path, **forced) for forced in (
        {}, {"maxnreg": 24}, {"num_warps": 32}))
    found = list(compare.differences({"rows": {"k": usual}}, {"rows": {"k": starved}}))
    assert usual["spills"] == 0 < usual["loads_16"]
    assert any("registers" in text for text in found), found
    assert any("spills" in text for text in found), found
    found = list(compare.differences({"rows": {"k": usual}}, {"rows": {"k": narrow}}))
    assert any("loads_16" in text for text in found), found
    # and in the machine code, which is all that nvcc leaves
    read = [machine_code.kernels(p, "sm_80")["sm_80 optimizer_kernel"]
            for p in (tmp_path / "cache").rglob("*.cubin")]
    assert len(read) == 3 and {**usual, "shared": 0} in read


def test_a_kernel_is_named_without_the_hashes_of_its_folder() -> None:
    symbol = "_ZN2ff46_GLOBAL__N__02f92608_13_batch_pass_cu_4caa4b0810peer_statsI6__halfEEvNS_1PE"
    assert machine_code.plain(symbol) == "_ZN2ffbatch_pass.10peer_statsI6__halfEEvNS_1PE"


def ratios(noise: random.Random, slow: float, rounds: int = timing.ROUNDS) -> timing.Row:
    """A verdict on turns that last 1, sometimes much more, the head's `slow` times as long."""
    def turn(factor: float) -> timing.Row:
        busy = min(1 + abs(noise.gauss(0, 0.1)) + (noise.random() < 0.2) * noise.random() * 3
                   for _ in range(3))
        return {"cpu": factor * busy, "wall": factor * busy}

    turns = [(turn(1.0), turn(slow)) for _ in range(rounds)]
    return timing.verdict([b for b, _ in turns], [h for _, h in turns], 0.12)


def test_the_verdict_tells_noise_from_slower() -> None:
    noise = random.Random(0)
    assert not [i for i in range(300) if ratios(noise, 1.0)["status"] == "slower"]
    assert not [i for i in range(300) if ratios(noise, 1.08)["status"] == "slower"]
    assert all(ratios(noise, 1.3)["status"] == "slower" for _ in range(300))


@pytest.mark.parametrize(("n", "index"), [(9, 0), (21, 4), (31, 7)])
def test_the_confidence_limit_of_the_median(n: int, index: int) -> None:
    assert timing.rank(n) == index  # 0.2 %, 0.4 % and 0.2 % that as few fall below the median


class Answers:
    """A side whose turns all say the same."""

    def __init__(self, cpu: float) -> None:
        self.cpu = cpu

    def send(self, **request: Any) -> None:
        assert request["do"] == "prepare"

    def receive(self) -> timing.Row:
        return {"count": 1}

    def ask(self, **request: Any) -> timing.Row:
        assert request["do"] == "turn"
        time.sleep(0.01)
        return {"cpu": self.cpu, "wall": self.cpu}


def test_a_machine_too_busy_decides_nothing_and_says_so() -> None:
    pair = timing.Pair.__new__(timing.Pair)
    pair.sides = {"base": Answers(1.0), "head": Answers(2.0)}  # type: ignore[dict-item]
    now = time.monotonic()
    (row,) = timing.looks(pair, {"case": 0.1}, timing.ROUNDS, now - 1.0, seconds=0.0)
    assert row["status"] == "untimed" and "no time was left" in timing.line(row)
    row = pair.look("case", 0.1, timing.ROUNDS, now, time.monotonic() + 0.05)
    assert row["status"] == "untimed" and "rounds in its time" in timing.line(row)
    (row,) = timing.looks(pair, {"case": 0.1}, timing.ROUNDS, now, seconds=60.0)
    assert (row["status"], row["rounds"], row["ratio"]) == ("slower", timing.ROUNDS, 2.0)


SLOW, WRONG, DEADLY, FINE = ("local_pass 32x800x4x4 fp32", "local_pass 32x200x16x16 fp32",
                             "convolve 32x800x4x4 bf16", "local_pass 32x200x16x16 bf16")
PLANTED_IN_THE_TREE = """

import time as _time
_plain = local_pass


def local_pass(a, *rest, **named):
    start = _time.process_time()
    made = _plain(a, *rest, **named)
    spent = _time.process_time() - start
    if tuple(a.shape[1:]) == (800, 4, 4):
        while _time.process_time() - start < 1.3 * spent:
            pass
    if tuple(a.shape[1:]) == (200, 16, 16) and a.element_size() == 4:
        made.g.add_(1.0)
    return made
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree whose local_pass is slow on one shape and wrong on another."""
    tree = tmp_path_factory.mktemp("trees") / "head"
    for folder in ("ffengine", "kernels", "bench"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns(
            "__pycache__", "results", "baselines"))
    with (tree / "ffengine" / "ops" / "local_pass.py").open("a") as code:
        code.write(PLANTED_IN_THE_TREE)
    with (tree / "ffengine" / "nn" / "convolution.py").open("a") as code:
        code.write("\n\ndef convolve(*a: object) -> None:\n    import os\n    os._exit(3)\n")
    return tree


def test_planted_slow_wrong_and_deadly_cases(planted: Path) -> None:
    rows = {row["name"]: row for row in timing.compare(
        ROOT, planted, [SLOW, WRONG, DEADLY, FINE], seconds=200)}
    assert list(rows) and set(rows) == {SLOW, WRONG, DEADLY, FINE}
    assert [rows[SLOW][look]["status"] for look in ("second_look", "third_look")] == ["slower"] * 2
    assert rows[SLOW]["status"] == "slower"
    assert 1.15 < rows[SLOW]["ratio"] < 1.6
    assert "allowed 1.15; second look 1." in timing.line(rows[SLOW])
    assert rows[WRONG]["status"] == "failed" and "ValueError" in timing.line(rows[WRONG])
    assert timing.line(rows[DEADLY]) == (f"failed  {DEADLY}: head: the worker ended with status 3")
    assert rows[FINE]["status"] == "ok"  # the worker was replaced


def test_cases_that_one_side_lacks(planted: Path, tmp_path: Path) -> None:
    tree = tmp_path / "base"
    shutil.copytree(planted, tree, symlinks=True)
    code = (tree / "bench" / "cases.py")
    code.write_text(code.read_text() + (
        "\n\n_all = cases\n\n\ndef cases() -> list[Case]:\n"
        "    return [Case('old', _all()[0].make, True, 1.0)]\n"))
    rows = {row["name"]: row for row in timing.compare(tree, planted, ["old", FINE], seconds=200)}
    assert {name: row["status"] for name, row in rows.items()} == {"old": "gone", FINE: "new"}
    assert timing.line(rows[FINE]) == f"new     {FINE}: base has no such case"


def test_a_head_that_cannot_be_imported_is_red(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "head"
    (broken / "ffengine").mkdir(parents=True)
    (broken / "ffengine" / "__init__.py").write_text("raise ImportError('planted')\n")
    for head, red in ((broken, True), (ROOT, False)):
        monkeypatch.setattr(base, "ROOT", head)
        monkeypatch.setattr(base, "tree", lambda ref, head=head: (
            ROOT if head is broken else broken, "abc"))
        verdict = gate.Verdict()
        assert gate.gate_timing(None, verdict, [FINE]) == []
        assert (bool(verdict.red), bool(verdict.skipped)) == (red, not red)


def test_no_base_is_a_skipped_line(monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(base.NoBase, match="there is no commit no-such-ref here"):
        base.tree("no-such-ref")
    verdict = gate.Verdict()
    assert gate.gate_timing("no-such-ref", verdict) == [] and verdict.word == "inconclusive"
    assert capsys.readouterr().out.startswith("skipped timing: there is no commit no-such-ref")


def test_the_base_is_built_anew_only_where_its_sources_differ(tmp_path: Path) -> None:
    trees = [tmp_path / name for name in ("one", "other")]
    for tree in trees:
        (tree / "csrc").mkdir(parents=True)
        for name in ("csrc/a.cpp", "CMakeLists.txt", "setup.py"):
            (tree / name).write_text(name)
    assert base.same_sources(*trees)
    (trees[1] / "csrc" / "a.cpp").write_text("another")
    assert not base.same_sources(*trees)
