"""The checks of DeeperForward files.

Step-wise teacher forcing starts each step from the fp64 reference's weights and optimizer state.
Inside the step rounding travels through the layers, so layer i's reduction length is the sum of
those up to i and the reference's error the largest up to i, over some draws of its rounding.
Where a unit's pre-activation lies within rounding of zero, relu's gradient may be 0 or 1: the rule
allows the jump, computed from the exact values. Layer-wise teacher forcing gives
each layer the reference's own input, rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from golden_common import (
    DTYPES,
    EXACT,
    Envelope,
    Errors,
    broken,
    digest,
    draws,
    in_the_interpreter,
    rule,
    sample,
)
from golden_df import Golden, parameter
from golden_run import (
    FP64,
    Step,
    Trajectory,
    breadth_first,
    case_layer,
    features,
    layer_inputs,
    layer_turn,
    planner,
    run_cases,
    trained,
    trajectory,
)
from tolerances import EPS

from ffengine.adapt import select
from ffengine.engine.memory.plan import Plan
from ffengine.nn import LocalConv2d, LocalNet
from ffengine.ops.local_pass import local_pass
from ffengine.ops.weight_update import OptimConfig
from ffengine.reference.weight_update import optimizer_step, weight_gradient


def checks_of(path: Path, folder: Path) -> dict[str, Callable[[], None]]:
    """Name and check, in order: exact first."""
    if "cases" in Golden.open(path).config:
        return {
            "fp64": lambda: check_cases(path),
            **{f"cpu {name}": functools.partial(
                lambda d: close_cases(path, run_cases(path, d, "cpu"), d), dtype)
               for name, dtype in DTYPES.items()},
            "triton fp32": lambda: close_cases(
                path, interpreted(path, "float32", folder), torch.float32)}
    checks: dict[str, Callable[[], None]] = {
        "training": lambda: check_training(path), "validation": lambda: check_validation(path),
        "plans": lambda: check_plans(path)}
    for name, dtype in DTYPES.items():
        checks[f"layers, cpu {name}"] = functools.partial(check_layers, path, "cpu", dtype)
        checks[f"steps, cpu {name}"] = functools.partial(check_steps, path, "cpu", dtype)
    return checks


def gpu_checks_of(path: Path) -> dict[str, Callable[[], None]]:
    """The same for a machine with a GPU."""
    check = check_layers if "layers" in Golden.open(path).config else (
        lambda p, b, d: close_cases(p, run_cases(p, d, b), d))
    return {f"{backend} {name}": functools.partial(check, path, backend, dtype)
            for backend in ("triton", "cuda") for name, dtype in DTYPES.items()}


def check_training(path: Path) -> None:
    """Losses, goodness, learning rate, gradients and weights of every step."""
    run = trajectory(path)
    golden, arrays = run.golden, run.golden.arrays
    names, errors = golden.config["param_names"], Errors(EXACT)
    for t, step in enumerate(run.steps):
        errors.note("lr", step.lr, arrays["lr"][t])
        errors.note("loss", torch.stack(step.losses), arrays["loss"][t])
        errors.note("goodness", torch.stack(step.goodness), arrays["goodness"][t])
        for p, name in enumerate(names):
            index, kind = parameter_key(run.net, name)
            for prefix, tensor, row in (("", step.after[f"layers.{index}.{kind}"], t + 1),
                                        ("g", step.grads[index, kind], t)):
                expected = arrays[f"{prefix}digest"][row][p]
                errors.note(f"{prefix}digest", digest(tensor), expected, abs(expected[1]))
                errors.note(f"{prefix}sample", sample(tensor), arrays[f"{prefix}sample"][row][p])
    for p, name in enumerate(names):
        errors.note("initial digest", digest(golden.initial(p)), arrays["digest"][0][p],
                    abs(arrays["digest"][0][p][1]))
        if f"final.{name}" in arrays:
            errors.note("final", parameter(run.net, name).detach(), arrays[f"final.{name}"])
    if "lr_after" in golden.config:
        errors.note("lr_after", run.optimizer.param_groups[0]["lr"], golden.config["lr_after"])
    errors.check()


def parameter_key(net, name: str) -> tuple[int, str]:
    wanted = parameter(net, name)
    return next((i, kind) for i in range(len(net.layers))
                for kind, p in net.layer(i).named_parameters() if p is wanted)


def check_validation(path: Path) -> None:
    """Goodness, scores, SIP and features after training."""
    run = trajectory(path)
    golden, arrays, net = run.golden, run.golden.arrays, run.net
    net.eval()
    errors, batches = Errors(EXACT), golden.validation()
    with torch.no_grad():
        goodness = torch.cat([torch.stack(net.goodness(x, backend="reference"))
                              for x, _ in batches], 1)
        errors.note("val.goodness", goodness, arrays["val.goodness"])
        start, end = golden.config["default_start_end"]
        net.set_range(start, min(end, len(net.layers) - 1))
        errors.note("val.logits_default", torch.cat([net(x) for x, _ in batches]),
                    arrays["val.logits_default"])
        sip = select(net, batches, backend="reference")
        count = len(arrays["val.y"])
        errors.note("val.corrects", (sip.table * count).round().triu(),
                    np.triu(arrays["val.corrects"]))
        errors.note("val.sip", [sip.start, sip.end], arrays["val.sip"])
        last = len(net.layers) - 1
        errors.note("val.acc", [100 * sip.accuracy, 100 * sip.table[min(1, last), last]],
                    arrays["val.acc"])
        errors.note("val.local_acc", 100 * sip.layer_accuracy, arrays["val.local_acc"])
        errors.note("val.logits_sip", torch.cat([net(x) for x, _ in batches]),
                    arrays["val.logits_sip"])
        if "val.rep_digest" in arrays:
            z = torch.cat([features(net, x, golden.config["rep"]) for x, _ in batches])
            expected = arrays["val.rep_digest"]
            errors.note("val.rep_digest", digest(z), expected, abs(expected[1]))
            errors.note("val.rep_sample", sample(z), arrays["val.rep_sample"])
    errors.check()


def check_plans(path: Path) -> None:
    """Every plan gives the gradients, and in fp64 the weights, of breadth-first training."""
    run = trajectory(path)
    for step in run.steps[:1]:
        for name, plan in some_plans(run.net, len(step.x)).items():
            other, errors = trained(run.golden), Errors(1e-12)
            other.restore(step.before, step.lr)
            other.step(step.x, step.y, plan, FP64, "reference")
            for i, (goodness, loss) in enumerate(zip(other.report.goodness, other.report.losses,
                                                     strict=True)):
                errors.note(f"{name}: goodness", goodness, step.goodness[i])
                errors.note(f"{name}: loss", loss, step.losses[i])
            for key, grad in other.grads.items():
                size = 1 / max(step.grads[key].abs().max().item(), 1e-300)
                errors.note(f"{name}: gradient", grad * size, step.grads[key] * size)
            for key, weight in other.net.named_parameters():
                errors.note(f"{name}: weight", weight.detach(), step.after[key])
            errors.check()


def some_plans(net, batch: int) -> dict[str, Plan]:
    """Depth-first in single samples, mixed runs and odd tiles, and the planner's leanest."""
    plans = planner(net, batch, FP64, "reference")
    cuts = list(range(1, plans.depth - 1, 3))
    tiles = [(batch, 1, 3)[i % 3] for i in range(len(cuts) + 1)]
    return {"depth-first 1": plans.fixed([], 1), "mixed": plans.fixed(cuts, tiles),
            "leanest": plans.best(plans.smallest().peak_bytes)}


def check_steps(path: Path, backend: str, dtype: torch.dtype) -> None:
    """Each step from the reference's state: goodness, losses, gradients, steady weights."""
    run = trajectory(path)
    ours = trained(run.golden, dtype)
    plans = [breadth_first(ours.net, len(run.steps[0].x), dtype, b) for b in ("reference", backend)]
    worst: list[str] = []

    def step_from(step: Step, x: torch.Tensor, plan: Plan, name: str) -> dict[str, torch.Tensor]:
        ours.restore(step.before, step.lr)
        ours.step(x, step.y, plan, dtype, name)
        return ours.outcome()

    for t, step in enumerate(run.steps):
        same = [step_from(step, x, plans[0], "reference") for x in draws(step.x, dtype)]
        got = step_from(step, step.x, plans[1], backend)
        worst += [f"step {t}, {line}" for line in step_errors(
            run.golden.optim(), step, exact_at(run, step), same, got, dtype)]
    assert not worst, "\n".join(worst)


def outcome(step: Step) -> dict[str, torch.Tensor]:
    """What a step leaves, in the words of Trained.outcome."""
    out = {f"goodness {i}": g for i, g in enumerate(step.goodness)}
    out |= {f"loss {i}": v for i, v in enumerate(step.losses)}
    out |= {f"gradient {i}.{kind}": g for (i, kind), g in step.grads.items()}
    return out | {f"weight {name.removeprefix('layers.')}": w for name, w in step.after.items()}


def step_errors(optim: OptimConfig, step: Step, exact_net: LocalNet,
                same: list[dict[str, torch.Tensor]], got: dict[str, torch.Tensor],
                dtype: torch.dtype) -> list[str]:
    out, exact, depth, envelope, net = [], outcome(step), 0, Envelope(dtype), exact_net
    with torch.no_grad():
        inputs = layer_inputs(exact_net, step.x)
    for i in range(len(net.layers)):
        layer = net.layer(i)
        depth += layer.weight[0].numel()
        reduction = depth + len(step.x) * int(np.prod(
            layer.out_shape(net.input_of(i, net.shapes[i]))[1:]))
        limits = {}
        for kind in ("goodness", "loss", *(f"gradient {n}" for n, _ in layer.named_parameters())):
            word, *part = kind.split()
            key = ".".join([f"{word} {i}", *part])
            limits[key] = envelope.limit(kind, exact[key], [d[key] for d in same], reduction)
            if word == "gradient":
                near = 2 * envelope.relative["goodness"] + EPS[dtype] * reduction**0.5
                limits[key] += flipped(layer, inputs[i], step.y, near)[part[0]]
            error = (got[key].double() - exact[key]).abs().max().item()
            if not error <= limits[key]:
                out.append(f"{key}: error {error:.3e} > bound {limits[key]:.3e}")
        for kind, _ in layer.named_parameters():
            key, weight = f"gradient {i}.{kind}", f"weight {i}.{kind}"
            allowed = rule(exact[weight], [d[weight] for d in same], dtype, reduction) + propagated(
                optim, step, f"layers.{i}.{kind}", exact[key], limits[key])
            over = (got[weight].double() - exact[weight]).abs() - allowed
            sure = exact[key].abs() > limits[key]
            if sure.any() and not over[sure].max() <= 0:
                out.append(f"{weight}: {over[sure].max():.3e} above its bound")
    return out


def exact_at(run: Trajectory, step: Step) -> LocalNet:
    """The fp64 network in the state a step starts from."""
    exact = trained(run.golden)
    exact.restore(step.before, step.lr)
    return exact.net


def flipped(layer: LocalConv2d, x: torch.Tensor, y: torch.Tensor, near: float) -> dict[str, float]:
    """How far a gradient jumps if units within rounding of zero cross it (relu: 0 or 1).

    A unit counts as within rounding if |a| <= near * max|a|; `near` is the rule's bound, relative.
    """
    with torch.no_grad():
        a = layer.preactivation(x)
        at_zero = (a != 0) & (a.abs() <= near * a.abs().max())
        if not at_zero.any():
            return {"weight": 0.0, "bias": 0.0}
        coef = local_pass(a, y, config=layer.config, backend="reference").coef.abs()
        width = torch.tensor(layer.config.offsets(a.shape[1])).diff()
        da = at_zero * coef.repeat_interleave(width, 1)[..., None, None]
        g = layer.geometry
        grad = weight_gradient(x.abs(), da, layer.weight, g.stride, g.padding)
    return {"weight": grad.max().item(), "bias": da.sum((0, 2, 3)).max().item()}


def propagated(optim: OptimConfig, step: Step, name: str, grad: torch.Tensor,
               limit: float) -> torch.Tensor:
    """How far the optimizer moves a weight when its gradient is off by the rule's bound."""
    moved = []
    for shift in (0.0, limit, -limit):
        weight, m, v = (step.before[k].clone() for k in (name, f"{name}.m", f"{name}.v"))
        optimizer_step(weight, grad + shift, m, v, replace(optim, lr=step.lr),
                       int(step.before[f"{name}.step"]) + 1)
        moved.append(weight)
    return torch.maximum((moved[1] - moved[0]).abs(), (moved[2] - moved[0]).abs())


def check_layers(path: Path, backend: str, dtype: torch.dtype) -> None:
    """Each layer from the reference's input and weights."""
    run, out = trajectory(path), []
    for step in run.steps:
        exact, rough = trained(run.golden), trained(run.golden, dtype)
        exact.restore(step.before, step.lr)
        rough.restore(step.before, step.lr)
        with torch.no_grad():
            inputs = layer_inputs(exact.net, step.x)
        for i, x in enumerate(inputs):
            layer = rough.net.layer(i)
            right = layer_turn(exact.net.layer(i), x, step.y, "reference")
            ours, same = (layer_turn(layer, x.to(dtype), step.y, b) for b in (backend, "reference"))
            near = EPS[dtype] * layer.weight[0].numel()**0.5
            jumps = flipped(exact.net.layer(i), x, step.y, near)
            out += turn_errors(f"layer {i} ", ours, right, same, dtype, layer, jumps)
    assert not out, "\n".join(out)


def turn_errors(where: str, ours: dict, exact: dict, same: dict, dtype: torch.dtype,
                layer, jumps: dict[str, float] | None = None) -> list[str]:
    pixels = exact["z"][:, 0].numel()
    lengths = {"goodness": pixels, "loss": pixels, "z": pixels}
    fan_in = layer.weight[0].numel()
    jumps = jumps or {}
    return [line for k in ours
            for line in broken(where + k, ours[k], exact[k], same[k], dtype,
                               fan_in + lengths.get(k, pixels),
                               jumps.get(k.removeprefix("grad."), 0.0))]


def check_cases(path: Path) -> None:
    """Single layers, fp64, against the published layer; a dead group has no gradient at all."""
    golden, errors = Golden.open(path), Errors(EXACT)
    for i, result in enumerate(run_cases(path, FP64, "reference")):
        for key, tensor in result.items():
            errors.note(key, tensor.detach(), golden.arrays[f"c{i}.{key}"])
        layer, x = case_layer(golden, i, FP64)
        with torch.no_grad():
            errors.note("h", layer.preactivation(x).relu(), golden.arrays[f"c{i}.h"])
        assert_dead(golden, i, result)
    errors.check()


def assert_dead(golden: Golden, i: int, result: dict[str, torch.Tensor]) -> None:
    case = golden.config["cases"][i]
    if "dead" in case:
        width = case["cout"] // case["G"]
        rows = slice(case["dead"] * width, (case["dead"] + 1) * width)
        assert not result["grad.weight"][rows].any()
        assert not result["z"][:, rows].any()


def close_cases(path: Path, results: list[dict[str, torch.Tensor]], dtype: torch.dtype) -> None:
    golden, out = Golden.open(path), []
    for i, same in enumerate(run_cases(path, dtype, "reference")):
        exact = {k: torch.from_numpy(np.asarray(golden.arrays[f"c{i}.{k}"])).double() for k in same}
        layer, _ = case_layer(golden, i, dtype)
        out += turn_errors(f"c{i} ", results[i], exact, same, dtype, layer)
        assert_dead(golden, i, results[i])
    assert not out, "\n".join(out)


def interpreted(path: Path, dtype: str, folder: Path) -> list[dict[str, torch.Tensor]]:
    """The cases through Triton's interpreter."""
    results = in_the_interpreter(Path(__file__).with_name("golden_run.py"), path,
                                 folder / "cases.npz", ("triton", dtype))
    count = len(Golden.open(path).config["cases"])
    return [{k.split(".", 1)[1]: t for k, t in results.items() if k.startswith(f"c{i}.")}
            for i in range(count)]
