"""A step as data: what its list says, what it refuses, and what it prints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import every as models
from models.every import TINY

import ffengine as ff
from ffengine.engine.batch import Batch
from ffengine.engine.compiling import compile_step
from ffengine.engine.context import StepContext, Turn
from ffengine.engine.execute import HOME, execute, train_batch
from ffengine.engine.memory.listing import sentence, steps, text
from ffengine.engine.memory.planner import Planner
from ffengine.engine.memory.shapes import measure
from ffengine.engine.optim import LocalOptimizer
from ffengine.engine.program import Facts, Instruction, Loop, Part, Program, Store, finished
from ffengine.engine.schedules.schedule import of
from ffengine.nn import LinearHead, LocalLinear, LocalNet
from ffengine.ops.config import LocalPassConfig, Norm
from ffengine.ops.weight_update import OptimConfig

FACTS = Facts(Turn((), 0), 8)


def line(op: str, reads: str = "", writes: str = "", index: int = 0) -> Instruction:
    return Instruction(op, index, tuple((n, n) for n in reads.split()), tuple(writes.split()))


def tiles(*lines: Instruction, **options: Any) -> Loop:
    return Loop(lines, 2, **options)


def instructions(program: Program) -> list[Instruction]:
    return [one for part in program.parts
            for one in (part.lines if isinstance(part, Loop) else (part,))]


@pytest.mark.parametrize(("parts", "said"), [
    ([line("forward", "x0", "a0")], "forward 0 expected x0 to read"),
    ([line("encode", "batch", "x0"), tiles(line("forward", "x1", "a0"), reads=("x0",))],
     "forward 0 expected x1 to read"),
    ([line("encode", "batch", "x0"), tiles(line("forward", "x0", "a0"), reads=("x0", "g0"))],
     "segment expected g0 to read"),
    ([line("encode", "batch", "x0"),
      tiles(line("forward", "x0", "a0"), reads=("x0",), stores=(Store("x1", (3,)),))],
     "segment expected its tiles to leave x1"),
], ids=["never", "in a tile", "a share", "not stored"])
def test_a_program_that_reads_what_is_not_there_is_refused(parts: list[Part], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^\[program\] {said}"):
        finished(parts, FACTS)


def test_the_last_reader_frees_and_nothing_is_left() -> None:
    made = finished([
        line("encode", "batch", "x0"), line("forward", "x0", "a0"),
        tiles(line("local_pass", "a0", "d0 x1"), line("update", "x0 d0"), reads=("a0", "x0"),
              stores=(Store("x1", (3,)),)),
        line("head", "x1")], FACTS)
    encode, forward, segment, head = made.parts
    assert (encode.frees, forward.frees) == ({"batch"}, frozenset())
    assert isinstance(segment, Loop) and segment.frees == {"a0", "x0"}
    # a tile's own: its rows of what it reads, and what it made and does not store
    assert [one.frees for one in segment.lines] == [{"a0"}, {"x0", "d0"}]
    assert head.frees == {"x1"}


def test_an_unknown_instruction_is_refused() -> None:
    net = models.network("sn/mlp")
    ctx = StepContext(net, None, torch.zeros(8, dtype=torch.int64), 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^\[program\] expected an instruction of .*'sing'$"):
        execute(finished([line("sing")], FACTS), ctx, torch.float32, {})


@pytest.mark.parametrize("name", sorted(n for n in TINY if not n.startswith("bp/")))
def test_every_model_has_a_program_that_updates_what_trains(name: str) -> None:
    """Every instruction is known, every layer and head in training is updated once a turn (twice
    where two losses train a layer), and the list can be read."""
    net = models.network(name)
    schedule = of(net, None)
    schedule.begin(net, 3)
    for turn in {schedule.turn(e, i) for e in range(schedule.total) for i in (0, 1)}:
        rows = 8
        plan = Planner(measure(net, rows, torch.float32, schedule=schedule)).one_tile()
        program = schedule.program(net, plan, Facts(turn, rows))
        found = instructions(program)
        assert {one.op for one in found} <= set(HOME)
        assert schedule.program(net, plan, Facts(turn, rows)) is program
        updated = {one.index for one in found if one.op in ("update", "update_own", "linear_step")}
        assert updated == set(turn.layers)
        assert {one.index for one in found if one.op in ("head", "head_alone", "gram")} == set(
            turn.heads)
        assert all(sentence(one) for one in found)


def test_steps_say_bytes_that_a_real_step_holds() -> None:
    """The largest number of the list is below the plan's peak and above the floor, and the lines of
    a plan with cuts and tiles are all there."""
    net = models.network("deeperforward/resnet17")
    planning = ff.Trainer(net, epochs=1, batch_size=8, progress=False).planning
    (found,) = steps(planning, 8)
    plan = planning.plans(8).largest
    lines = [one for part in found["parts"] for one in part.get("lines", [part])]
    assert plan.floor_bytes < max(one["live_bytes"] for one in lines) <= plan.peak_bytes
    assert sum(one["text"].startswith("update") for one in lines) >= 17
    said = list(text([found]))
    assert said[0].startswith("epoch 0: layers 0, 1, 2")
    assert len(said) == 1 + len(lines) + sum("lines" in part for part in found["parts"])


def test_a_hook_is_told_of_every_instruction_in_order() -> None:
    net = models.network("deeperforward/tinycnn")
    trainer = ff.Trainer(net, epochs=1, batch_size=4, progress=False)
    seen: list[Instruction] = []
    x, y = torch.randn(4, *net.in_shape), torch.arange(4) % net.num_classes
    plan = trainer.planning.plans(4).at(0)
    ctx = trainer._context(Batch(x, y))
    ctx.hook = lambda at, one: seen.append(one)
    trainer.schedule.train(ctx, Batch(x, y), plan, torch.float32)
    program = compile_step(net, plan, Facts(trainer.schedule.turn(0, 0), 4))
    assert [one.op for one in seen if one.op == "encode"] == ["encode"]
    assert {replace(one) for one in seen} == set(instructions(program))


@pytest.mark.parametrize("cuts", [[], [0], [0, 1]], ids=str)
@pytest.mark.parametrize("tile", [1, 3, 8])
def test_a_head_reads_every_layer_whatever_the_plan(cuts: list[int], tile: int) -> None:
    """Inside a run, at its end, and where the map is stored for the next one too."""
    def trained(cuts: list[int], tile: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        config = LocalPassConfig(groups=2, norm=Norm("none"))
        net = LocalNet([LocalLinear(8, 8, config=config) for _ in range(3)], num_classes=2,
                       in_shape=(8,), input_norm="none",
                       heads=[LinearHead((0, 1, 2), 24, 2)]).double()
        optimizer = LocalOptimizer(net.named_parameters(), OptimConfig(lr=0.01))
        x, y = torch.randn(8, 8, dtype=torch.float64), torch.arange(8) % 2
        plan = Planner(measure(net, 8, torch.float64, backend="reference")).fixed(cuts, tile)
        turn = Turn((0, 1, 2), 3, heads=(0,))
        ctx = StepContext(net, optimizer, y, 8, backend="reference", turn=turn)
        report = train_batch(ctx, x, plan, torch.float64)
        assert report.heads[0] is not None
        return [report.heads[0][1], *(p.detach() for p in net.parameters())]

    for got, want in zip(trained(cuts, tile), trained([], 8), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
