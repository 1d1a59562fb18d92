"""A line each of what must be right before anything else is worth its time.

local_pass in bf16 on ResNet-17's four stages, and which kernels it started; batch_pass, the
optimizer, linear_step, weight gradients, one whole step, two bit-identical runs and a second step
without synchronisation: by every back-end, against the reference.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch.nn import functional

from bench.gpu import clock, sweeps
from bench.gpu.checked import gradients, problem_of
from bench.gpu.records import Row
from bench.gpu.session import Session
from bench.gpu.work import Job, worker
from ffengine.engine.memory.plan import Plan
from ffengine.ops import backends
from ffengine.ops.config import BatchNorm, LocalPassConfig, Norm
from ffengine.ops.local_pass import local_pass
from ffengine.ops.optim import ConvGeometry, OptimConfig, OptimState, Parameter
from ffengine.ops.weight_update import gradient_update, weight_update
from tests import batch_pass_cases, linear_step_cases
from tests.tolerances import assert_close

#: Of the kernels that read a sample once, through a cluster of thread blocks.
ONE_READ = "one_read"
#: Share that a bf16 step's losses may be off the fp32 reference's.
LOSS_SHARE = 0.02
Check = Callable[[Session, str], Row | None]
#: A back-end's default plan, once it was searched.
PLANS: dict[str, Plan | None] = {}


def sweep(stage: str) -> Check:
    """local_pass, bf16, channels_last."""
    def check(session: Session, backend: str) -> Row:
        config = LocalPassConfig(groups=10)
        a, y = sweeps.inputs(session.scale.sweeps[stage], torch.bfloat16, "nhwc", 0, session.device)
        sweeps.check(local_pass(a, y, config=config, want_da=True, backend=backend), a, y, config)
        seen = clock.kernels(lambda: local_pass(a, y, config=config, want_da=True,
                                                backend=backend), session.device)
        path = "kernels not seen" if seen is None else (
            "one read, a cluster a sample" if any(ONE_READ in name for name, _ in seen) else
            f"two sweeps, {len(seen)} kernels")
        return {"kernels": seen, "text": path}
    return check


def batch_norm(session: Session, backend: str) -> None:
    """CwComp's layer: BatchNorm behind a pool, both layouts."""
    config = LocalPassConfig(groups=4, goodness="mean_sq", norm=Norm("none"), pool="max2")
    for layout, dtype in ((torch.channels_last, torch.bfloat16),
                          (torch.channels_last, torch.float32),
                          (torch.contiguous_format, torch.float32)):
        given = batch_pass_cases.draw(session.scale.batch_norm, config, BatchNorm(), dtype=dtype,
                                      layout=layout, device=session.scale.device)
        batch_pass_cases.check(given, config, BatchNorm(), backend)


def optimizer(session: Session, backend: str) -> None:
    """AdamW on fp32 weights, two steps against fp64."""
    optim = OptimConfig("adamw", lr=0.01, weight_decay=0.1)
    source = torch.Generator(session.device).manual_seed(3)
    start, *grads = (torch.randn(session.scale.weight, generator=source, device=session.device)
                     for _ in range(3))
    weights = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64),
                        ("reference", torch.float32)):
        weight = start.to(dtype, copy=True)
        state = OptimState.create(weight, optim)
        for grad in grads:
            gradient_update(Parameter(weight, state), grad.to(dtype), optim=optim, backend=name)
        weights.append(weight)
    assert_close(*weights, reduction=2, what="weight")


def linear(session: Session, backend: str) -> None:
    """linear_step, whole batch and by tiles."""
    for case in linear_step_cases.CASES[:2]:
        for tile in case.tiles[:2]:
            linear_step_cases.check(case, torch.float32, tile, backend, session.scale.device)


def weight_gradient(groups: Callable[[Session], int]) -> Check:
    """The weight gradient of a 3x3 convolution, bf16, channels_last, against products over patches
    in fp64, which no convolution of a library has a part in."""
    def check(session: Session, backend: str) -> None:
        n, c, h, w = session.scale.gradient
        parts, optim = groups(session), OptimConfig("sgd", lr=0.0)
        source = torch.Generator(session.device).manual_seed(5)
        x, da = (torch.randn(n, c, h, w, generator=source, device=session.device).bfloat16()
                 .contiguous(memory_format=torch.channels_last) for _ in range(2))
        weight = torch.zeros(c, c // parts, 3, 3, device=session.device)
        found = torch.full_like(weight, float("nan"))
        weight_update(Parameter(weight, OptimState.create(weight, optim), None, found), x, da,
                      optim=optim, geometry=ConvGeometry((3, 3), 1, 1, parts), backend=backend)
        for part in range(parts):
            mine = slice(part * c // parts, (part + 1) * c // parts)
            patches = functional.unfold(x[:, mine].double(), 3, padding=1)
            exact = torch.einsum("nop,nkp->ok", da[:, mine].double().flatten(2), patches)
            sweeps.near(found[mine].flatten(1), exact, f"dW of group {part}")
    return check


def step(session: Session, backend: str) -> Row:
    """One whole step: every gradient is right on a few samples, and every layer's loss on the whole
    batch is the reference's in fp32, to 2 %."""
    problem = problem_of(session, backend)
    verdict = gradients(session, problem)
    if verdict["check"] != "ok":
        return verdict
    ours = problem.trainer(states="fp32")
    PLANS[backend] = ours.plan
    plain = replace(problem, backend="reference", precision="fp32").trainer(
        states="fp32", plan=ours.plan)
    losses = [[float(v) for v in t.step(problem.x, problem.y).losses if v is not None]
              for t in (ours, plain)]
    for i, (a, b) in enumerate(zip(*losses, strict=True)):
        assert abs(a - b) <= LOSS_SHARE * max(1.0, abs(b)), f"layer {i}: loss {a}, expected {b}"
    return {"losses": losses[0], **verdict,
            "text": f"gradients within {verdict['gradient_error']:.1e} of fp64; last of "
                    f"{len(losses[0])} losses {losses[0][-1]:.4f}"}


def twice(session: Session, backend: str) -> None:
    """Two runs of two steps end at the same weights, bit for bit."""
    problem, ends = problem_of(session, backend), []
    for _ in range(2):
        made = problem.trainer(states="fp32", plan=PLANS.get(backend))
        for _ in range(2):
            made.step(problem.x, problem.y)
        ends.append(made.net.state_dict())
    for name, one in ends[0].items():
        assert torch.equal(one, ends[1][name]), f"{name} differs between two runs"


def asynchronous(session: Session, backend: str) -> None:
    """A step after the first waits for the device nowhere."""
    problem = problem_of(session, backend)
    made = problem.trainer(states="fp32", plan=PLANS.get(backend))
    made.step(problem.x, problem.y)
    with no_synchronisation(session):
        made.step(problem.x, problem.y)


def replayed(session: Session, backend: str) -> Row:
    """A captured step, replayed twice, ends at the weights of as many ordinary ones, to the bit."""
    problem = problem_of(session, backend)
    ours, plain = (problem.trainer(states="fp32", plan=PLANS.get(backend)) for _ in range(2))
    replay = ours.capture(problem.x, problem.y)
    for _ in range(2):
        replay()
    while plain.steps < ours.steps:
        plain.step(problem.x, problem.y)
    ends = [trainer.net.state_dict() for trainer in (ours, plain)]
    for name, one in ends[0].items():
        assert torch.equal(one, ends[1][name]), f"{name} differs from that of ordinary steps"
    return {"text": f"{ours.steps} steps" if replay.reason is None else
            f"ordinary steps: {replay.reason}"}


@contextlib.contextmanager
def no_synchronisation(session: Session) -> Iterator[None]:
    """Whatever waits for a GPU inside is an error."""
    session.synchronize()
    if session.device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def checks(session: Session) -> dict[str, Check]:
    """What is looked at, by name, in order."""
    return {**{f"local_pass {stage}": sweep(stage) for stage in session.scale.sweeps},
            "optimizer": optimizer, "step": step, "batch_pass": batch_norm,
            "weight gradient": weight_gradient(lambda s: 1),
            "grouped weight gradient": weight_gradient(lambda s: s.scale.groups),
            "linear_step": linear, "two runs alike": twice, "no synchronisation": asynchronous,
            "captured step": replayed}


def jobs(session: Session, args: argparse.Namespace) -> Iterator[Job]:
    for name, check in checks(session).items():
        for backend in session.scale.backends:
            yield f"{name}, {backend}", rows_of(session, check, backend)


def rows_of(session: Session, check: Check, backend: str) -> Callable[[], Iterable[Row]]:
    def rows() -> Iterable[Row]:
        reason = backends.why_not(backend, session.device.type, torch.float32)
        if reason is not None:
            yield {"backend": backend, "check": "absent", "error": reason}
            return
        found = check(session, backend)
        session.synchronize()
        yield {"backend": backend, **(found or {})}
    return rows


if __name__ == "__main__":
    sys.exit(worker(__doc__, jobs))
