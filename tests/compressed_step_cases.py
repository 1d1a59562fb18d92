"""Cases of the compressed optimizer step, and their check; every back-end takes the same ones.

The step is exact only up to the rounding of its fp32 operations, which a compiler may fuse. So each
new number is bracketed: its value in fp64 from the same decoded states, lowered and raised by what
those operations may round off. Rounding to a code is monotone for given random bits, so the code
must lie between the codes of the bracket's ends, and both ends have one code for almost every
element: there the code is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ffengine.ops.optim import OptimConfig, OptimState
from ffengine.reference import state_formats as formats
from ffengine.reference.weight_update import optimizer_step
from tests.kernels.check import Banded, hash_of
from tests.tolerances import EPS

#: Roundings that a new state may have suffered, in units of the terms it is a sum of.
ROUNDINGS = 4
TINY = 1e-300
#: Share of the codes that the bracket may leave open.
OPEN_SHARE = 0.01
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}
ADAMW = OptimConfig("adamw", lr=0.01, weight_decay=0.1)
ADAM = OptimConfig("adam", lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
MOMENTUM = OptimConfig("sgd", lr=0.1, momentum=0.9, weight_decay=0.1)
NESTEROV = OptimConfig("sgd", lr=0.1, momentum=0.9, nesterov=True)
PLAIN = OptimConfig("sgd", lr=0.1)
INV_SCALE = 0.25

#: (weight, grad, state, optim, inv_scale) -> None, in place.
Step = Callable[[torch.Tensor, torch.Tensor, OptimState, OptimConfig, float], None]


@dataclass(frozen=True)
class Case:
    optim: OptimConfig
    format: str = "8bit"
    bf16_weight: bool = False
    shape: tuple[int, ...] = (41, 49)  # eight blocks of 256, the last short
    taken: int = 6  # steps before this one; none: states are 0
    grad: torch.dtype = torch.float32
    odd: float | None = None  # one gradient in the second block
    zeros: bool = False  # no gradient in the second block, and no states yet
    offset: int = 0  # elements by which every tensor misses its alignment


CASES = {
    "8bit-adamw": Case(ADAMW),
    "8bit-adamw-bf16-weight": Case(ADAMW, bf16_weight=True),
    "8bit-adam-nhwc": Case(ADAM, shape=(24, 5, 3, 3)),
    "8bit-adam-first": Case(ADAM, taken=0),
    "8bit-adam-zeros": Case(OptimConfig("adam", lr=0.01), taken=0, zeros=True),
    "8bit-adamw-whole-blocks": Case(ADAMW, shape=(3, 512)),
    "8bit-adamw-one": Case(ADAMW, shape=(1,)),
    "8bit-adamw-misaligned": Case(ADAMW, shape=(700,), offset=3),
    "8bit-adamw-nan": Case(ADAMW, odd=float("nan")),
    "8bit-adamw-inf-bf16-weight": Case(ADAMW, odd=float("-inf"), bf16_weight=True),
    "8bit-momentum": Case(MOMENTUM),
    "8bit-nesterov-bf16-weight": Case(NESTEROV, bf16_weight=True),
    "bf16-adamw": Case(ADAMW, "bf16"),
    "bf16-adam-bf16-weight": Case(ADAM, "bf16", bf16_weight=True, shape=(24, 5, 3, 3)),
    "bf16-adamw-misaligned": Case(ADAMW, "bf16", bf16_weight=True, shape=(700,), offset=1),
    "bf16-momentum-nan": Case(MOMENTUM, "bf16", odd=float("nan")),
    "fp32-adamw-bf16-weight": Case(ADAMW, "fp32", bf16_weight=True),
    "fp32-sgd-bf16-weight": Case(PLAIN, "fp32", bf16_weight=True),
}
#: A gradient in 16 bits, which the Triton kernel reads as it is.
GRADIENTS_16 = {"8bit-adamw-bf16-grad": Case(ADAMW, grad=torch.bfloat16),
                "bf16-momentum-fp16-grad": Case(MOMENTUM, "bf16", grad=torch.float16)}


class Drawn:
    """A case's tensors between guard bands."""

    def __init__(self, case: Case, name: str, device: str) -> None:
        rng = torch.Generator().manual_seed(hash_of(name))
        self.case, count = case, case.optim.states
        weight = torch.randn(case.shape, generator=rng) * 0.1
        if weight.dim() == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        n = weight.numel()
        grad = torch.randn(n, generator=rng) * 10.0 ** (4 * torch.rand(n, generator=rng) - 4)
        old = [torch.randn(n, generator=rng) * 10.0 ** (3 * torch.rand(n, generator=rng) - 5)
               for _ in range(count)]
        old[1:] = [v.square() for v in old[1:]]
        if case.taken == 0:
            old = [torch.zeros(n) for _ in range(count)]
        if case.zeros:
            grad[256:512] = 0.0
        if case.odd is not None:
            grad[300] = case.odd
        self.banded: dict[str, Banded] = {}
        self.hold("weight", weight.bfloat16() if case.bf16_weight else weight, device)
        self.hold("grad", laid_out(grad, weight).to(case.grad), device)
        for key, x in zip("mv", old, strict=False):
            self.hold_state(key, x, weight, device, rng)

    def hold(self, name: str, t: torch.Tensor, device: str) -> None:
        self.banded[name] = Banded(t.to(device), True, self.case.offset)

    def hold_state(self, key: str, x: torch.Tensor, weight: torch.Tensor, device: str,
                   rng: torch.Generator) -> None:
        if self.case.format == "8bit":
            random = torch.randint(0, 1 << 16, (x.numel(),), generator=rng)
            codes = formats.SIGNED if key == "m" else formats.UNSIGNED
            x, scale = formats.encode(x, random, *codes)
            self.hold(f"{key}_scale", scale, device)
        self.hold(key, laid_out(x, weight).to(DTYPES[self.case.format]), device)

    def state(self) -> OptimState:
        views = {name: b.view for name, b in self.banded.items() if name not in ("weight", "grad")}
        return OptimState(**{"m": None, "v": None, **views}, step=self.case.taken,
                          seed=2**63 + 11, stream=0x80000000 | 5)

    def copies(self) -> tuple[torch.Tensor, torch.Tensor, OptimState]:
        """Weight, gradient (fp32, scaled) and state on the CPU, for the reference."""
        state = self.state()
        kept = {k: t.cpu().clone() for k, t in state.tensors().items()}
        made = OptimState(**{"m": None, "v": None, **kept}, step=state.step, seed=state.seed,
                          stream=state.stream)
        grad = self.banded["grad"].view.cpu().float() * INV_SCALE
        return self.banded["weight"].view.cpu().clone(), grad, made


def laid_out(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (n,), in the weight's memory order, in its shape."""
    out = torch.empty_like(weight, dtype=x.dtype)
    formats.flat(out).copy_(x)
    return out


def check(name: str, case: Case, step: Step, device: str = "cpu") -> None:
    """One step of `step` against the bracket, what is not finite against the reference."""
    drawn = Drawn(case, name, device)
    before, twin = drawn.copies(), drawn.copies()
    formats.compressed_step(*twin, case.optim)
    step(drawn.banded["weight"].view, drawn.banded["grad"].view, drawn.state(), case.optim,
         INV_SCALE)
    for key, banded in drawn.banded.items():
        banded.check(key, written=key != "grad")
    weight, _, after = drawn.copies()
    brackets = bracket(*before, case.optim)
    for key in (k for k in "mv" if getattr(after, k) is not None):
        check_state(key, after, twin[2], brackets[key], case.taken + 1)
    word = formats.words(slice(0, weight.numel()), after.seed,
                         after.stream ^ formats.WEIGHT_STREAM, case.taken + 1, weight.device)
    check_16_or_32("weight", formats.flat(weight), formats.flat(twin[0]), brackets["weight"],
                   word & 0xFFFF)


Bracket = tuple[torch.Tensor, torch.Tensor]  # lowest and highest, fp64


def decoded(key: str, state: OptimState) -> torch.Tensor | None:
    """A state's fp32 numbers in memory order."""
    stored, scale = getattr(state, key), getattr(state, f"{key}_scale")
    if stored is None or scale is None:
        return None if stored is None else formats.flat(stored).float()
    return formats.decode(formats.flat(stored), scale,
                          *(formats.SIGNED if key == "m" else formats.UNSIGNED))


def bracket(weight: torch.Tensor, grad: torch.Tensor, state: OptimState,
            optim: OptimConfig) -> dict[str, Bracket]:
    """Of the step's unrounded results."""
    w, g = formats.flat(weight).double(), formats.flat(grad).double()
    m, v = (None if t is None else t.double() for t in (decoded(key, state) for key in "mv"))
    decay = 0.0 if optim.kind == "adamw" else optim.weight_decay
    terms = g.abs() + decay * w.abs()  # the gradient is their sum
    # what the terms of each result add up to, which is what its rounding is a share of
    sums = {"weight": w.abs() + optim.lr * terms}
    if m is not None:
        sums["m"] = m.abs() + 2 * terms
        sums["weight"] = sums["weight"] + optim.lr * sums["m"]
    if v is not None:
        sums["v"] = v + 3 * (1 - optim.betas[1]) * terms.square()
    before = w.clone()
    optimizer_step(w, g, m, v, optim, state.step + 1)
    if m is not None and v is not None:
        share = 4 + sums["m"] / m.abs().clamp_min(TINY) + sums["v"] / v.clamp_min(TINY)
        sums["weight"] = before.abs() + (w - before).abs() * share
    exact = {"weight": w, "m": m, "v": v}
    return {key: around(exact[key], ROUNDINGS * EPS[torch.float32] / 2 * s)
            for key, s in sums.items()}


def around(x: torch.Tensor, slack: torch.Tensor) -> Bracket:
    return x - slack, x + slack


def check_state(key: str, after: OptimState, twin: OptimState, found: Bracket, step: int) -> None:
    stored, scale = formats.flat(getattr(after, key)), getattr(after, f"{key}_scale")
    word = formats.words(slice(0, stored.numel()), after.seed, after.stream, step, stored.device)
    random = word & 0xFFFF if key == "m" else word >> 16
    if scale is None:
        check_16_or_32(key, stored, formats.flat(getattr(twin, key)), found, random)
        return
    expected = getattr(twin, f"{key}_scale")
    assert torch.equal(scale.isnan(), expected.isnan()), f"{key}: NaN scales at other blocks"
    assert torch.equal(scale.isinf(), expected.isinf()), f"{key}: infinite scales at other blocks"
    usable = scale.isfinite()
    ends = [torch.stack([b.abs().max() for b in end.nan_to_num().split(formats.BLOCK)])
            for end in found]
    assert ((scale >= torch.minimum(*ends).float()) & (scale <= torch.maximum(*ends).float())
            )[usable].all(), f"{key}: scales {scale} outside {ends}"
    of = formats.spread(scale, stored.numel())
    codes = stored.int()
    assert (codes[~of.isfinite() | (of == 0)] == 0).all(), f"{key}: codes without a scale"
    index = torch.where(codes > 127, 128 - codes, codes) if key == "m" else codes
    assert not (key == "m" and (codes == 128).any()), "m: a negative 0"
    low, high = (coded(end, of, random, *(formats.SIGNED if key == "m" else formats.UNSIGNED))
                 for end in found)
    compare(key, index, low, high, of.isfinite() & (of > 0))


def coded(x: torch.Tensor, scale: torch.Tensor, random: torch.Tensor, bias: int,
          highest: int) -> torch.Tensor:
    """The signed index of the code of x (fp64): the format as csrc/common/state_formats.h says."""
    y = (x.abs() / scale.double()).clamp(max=1.0).float().view(torch.int32).long()
    index = ((y + (random << 4)) >> 20) - bias
    if highest == 255:
        return torch.where(x > 0, index.clamp(1, highest), 0)
    return index.clamp(0, highest) * x.sign().long()


def check_16_or_32(what: str, got: torch.Tensor, twin: torch.Tensor, found: Bracket,
                   random: torch.Tensor) -> None:
    assert torch.equal(got.isnan(), twin.isnan()), f"{what}: NaN at other places"
    usable = found[0].isfinite() & found[1].isfinite()
    if got.dtype is torch.float32:
        low, high = (end.float() for end in found)
        assert ((got >= low) & (got <= high))[usable].all(), f"{what}: outside its bracket"
        return
    index = upper(got.float(), torch.zeros_like(random))
    compare(what, index, *(upper(end.float(), random) for end in found), usable)


def upper(x: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """The signed index of the bf16 number that x (fp32) is rounded to."""
    return (((x.view(torch.int32) & 0x7FFFFFFF).long() + random) >> 16) * x.sign().long()


def compare(what: str, got: torch.Tensor, low: torch.Tensor, high: torch.Tensor,
            usable: torch.Tensor) -> None:
    outside = usable & ((got < low) | (got > high))
    assert not outside.any(), (
        f"{what}: {int(outside.sum())} of {got.numel()} outside their bracket, from "
        f"{int(outside.nonzero()[0])} on: {got[outside][:4]}, not in "
        f"{low[outside][:4]}…{high[outside][:4]}")
    still_open = int((usable & (low != high)).sum())
    assert still_open <= max(2, OPEN_SHARE * got.numel()), f"{what}: {still_open} brackets open"
