"""Settings and state of an optimizer step, and a convolution's geometry, for `weight_update`.

The codes are those of csrc/params.h. States are fp32, or bf16, or 8 bits with a scale for every
block (ffengine/reference/state_formats.py defines the formats).
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch

from ffengine.ops.config import ASIDE, Seed, Written

OPTIM_CODES = {"sgd": 0, "adam": 1, "adamw": 2}
STATE_CODES = {"fp32": 0, "bf16": 1, "8bit": 2}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
StatePrecision = Literal["fp32", "bf16", "8bit"]
#: Elements that share a scale in 8 bits.
BLOCK = 256
#: Parameters with fewer elements keep fp32 states, and layer weights stay fp32: they weigh nothing.
SMALLEST_COMPRESSED = 4096
#: Streams of optimizer steps; dropout's third counter word is a layer's number, far below.
STREAMS = 0x80000000


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer with the semantics of torch.optim (bias correction included).

    state_precision: of the states of parameters with at least SMALLEST_COMPRESSED elements, below
    fp64; they are rounded stochastically (8-bit first moments far below their block's largest are
    kept as 0: ffengine/reference/state_formats.py), the step itself is computed in fp32.
    """

    kind: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    state_precision: StatePrecision = "fp32"

    def __post_init__(self) -> None:
        if self.kind not in OPTIM_CODES:
            raise ValueError(
                f"[optimizer] kind must be one of {', '.join(OPTIM_CODES)}, got {self.kind!r}")
        if self.state_precision not in STATE_CODES:
            raise ValueError("[optimizer] state_precision must be one of "
                             f"{', '.join(STATE_CODES)}, got {self.state_precision!r}")
        if self.nesterov and (self.kind != "sgd" or self.momentum <= 0):
            raise ValueError("[optimizer] nesterov expected sgd with momentum > 0, got "
                             f"{self.kind} with momentum={self.momentum}")
        for name, value in (("lr", self.lr), ("eps", self.eps), ("momentum", self.momentum),
                            ("weight_decay", self.weight_decay)):
            if not value >= 0:
                raise ValueError(f"[optimizer] {name} must be 0 or more, got {value}")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"[optimizer] betas must lie in [0, 1), got {self.betas}")

    @property
    def states(self) -> int:
        """How many state tensors of the weight's shape the optimizer keeps."""
        return (1 if self.momentum else 0) if self.kind == "sgd" else 2


@dataclass(frozen=True)
class ConvGeometry:
    """A convolution's kernel, stride, zero padding and channel groups."""

    kernel: tuple[int, int]
    stride: int = 1
    padding: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        if min(self.kernel) < 1 or self.stride < 1 or self.padding < 0 or self.groups < 1:
            raise ValueError("[conv] expected kernel >= 1, stride >= 1, padding >= 0, groups >= 1, "
                             f"got kernel={self.kernel} stride={self.stride} "
                             f"padding={self.padding} groups={self.groups}")

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(P, Q) of an input of this size."""
        return ((height + 2 * self.padding - self.kernel[0]) // self.stride + 1,
                (width + 2 * self.padding - self.kernel[1]) // self.stride + 1)


LINEAR = ConvGeometry((1, 1))


@dataclass
class Half:
    """A weight's copy in 16 bits, as the weight was at `version`.

    Whoever writes into the weight raises its version, kernels of ours included; `weight.data` as a
    target of in-place operations is the one way past it.
    """

    copy: torch.Tensor
    #: Shares the weight's memory and version, and keeps that memory from being used again.
    of: torch.Tensor
    version: int = -1

    @classmethod
    def create(cls, weight: torch.Tensor, dtype: torch.dtype) -> Half:
        """Of the weight's layout; not up to date yet."""
        return cls(torch.empty_like(weight, dtype=dtype, requires_grad=False), weight.detach())

    def current(self, weight: torch.Tensor) -> torch.Tensor:
        """The copy, made anew if the weight is no longer what it was made of."""
        if self.version != weight._version or not self._same(weight):
            self.copy.copy_(weight.detach())
            self.of, self.version = weight.detach(), weight._version
        return self.copy

    def _same(self, weight: torch.Tensor) -> bool:
        mine, theirs = self.of.untyped_storage(), weight.untyped_storage()
        return bool(mine._cdata == theirs._cdata) and self.of.stride() == weight.stride()

    def written(self, weight: torch.Tensor) -> None:
        """A step has written weight and copy alike."""
        if self._same(weight):
            self.version = weight._version


@dataclass
class OptimState:
    """State of one weight: m (Adam's first moment, SGD's momentum), v, steps taken.

    m and v have the weight's shape and memory layout. In 8 bits they are uint8 codes, and
    `m_scale`, `v_scale` fp32 scales of every BLOCK elements in memory order. seed and stream pick
    the random bits of stochastic rounding: see csrc/common/state_formats.h.
    """

    m: Written | None
    v: Written | None
    step: int = 0
    m_scale: Written | None = None
    v_scale: Written | None = None
    seed: Seed = 0
    stream: int = STREAMS
    #: Kept up to date by the steps.
    half: Annotated[Half | None, ASIDE] = None
    #: On a device, `row_of` the updates from number `first` on, or none.
    rows: Annotated[tuple[torch.Tensor, ...], ASIDE] = ()
    first: Annotated[int, ASIDE] = 1

    @property
    def row(self) -> torch.Tensor | None:
        """(8,) fp32, the numbers of the next update where kernels read them from memory."""
        return self.rows[self.step + 1 - self.first] if self.rows else None

    @classmethod
    def create(cls, weight: torch.Tensor, config: OptimConfig, *, seed: int = 0,
               name: str = "") -> OptimState:
        """Zeros like the weight, in the format that `config` and the weight's size ask for.

        Args:
            seed: 64 bits; of stochastic rounding.
            name: states of different names draw different random bits.
        """
        form = state_format(weight.numel(), weight.dtype, config)
        made = [torch.zeros_like(weight, dtype=FORMAT_DTYPES[form] if weight.dtype
                                 is not torch.float64 else None, requires_grad=False)
                if config.states > i else None for i in range(2)]
        scales = [torch.zeros(blocks(weight.numel()), device=weight.device)
                  if form == "8bit" and config.states > i else None for i in range(2)]
        return cls(made[0], made[1], 0, scales[0], scales[1], seed, stream_of(name))

    @property
    def format(self) -> StatePrecision:
        """What m and v are stored as (fp64 states count as fp32: they are not rounded)."""
        return "fp32" if self.m is None else FORMATS.get(self.m.dtype, "fp32")

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the state holds in memory, by name."""
        parts = {"m": self.m, "v": self.v, "m_scale": self.m_scale, "v_scale": self.v_scale}
        return {name: t for name, t in parts.items() if t is not None}


class Parameter(NamedTuple):
    """A weight or bias, and what belongs to it in an update.

    All tensors have the shape and memory layout of `value`; the buffers are fp32 (fp64).
    """

    #: Stepped in place.
    value: Written
    #: None: no step.
    state: OptimState | None = None
    #: Zeroed by the caller before the first tile; gradients are added into it. None: the samples at
    #: hand are all there are.
    accumulate: Written | None = None
    #: Receives the finished gradient, before weight decay.
    grad_out: Written | None = None


FORMAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}
FORMATS: dict[torch.dtype, StatePrecision] = {torch.bfloat16: "bf16", torch.uint8: "8bit"}


def stream_of(name: str) -> int:
    """The third counter word of a state's random bits."""
    return STREAMS | (zlib.crc32(name.encode()) & (STREAMS - 1))


def blocks(numel: int) -> int:
    """Blocks that share a scale in 8 bits; the last may be short."""
    return -(-numel // BLOCK)


def state_format(numel: int, dtype: torch.dtype, config: OptimConfig) -> StatePrecision:
    """What the states of a weight of this size and dtype are stored as."""
    small = numel < SMALLEST_COMPRESSED or dtype is torch.float64
    return "fp32" if small else config.state_precision


def state_bytes(numel: int, dtype: torch.dtype, config: OptimConfig) -> int:
    """Bytes of a weight's states."""
    form = state_format(numel, dtype, config)
    item = 8 if dtype is torch.float64 else FORMAT_DTYPES[form].itemsize
    return config.states * (numel * item + (4 * blocks(numel) if form == "8bit" else 0))


def compressed(numel: int, dtype: torch.dtype, config: OptimConfig) -> bool:
    """The step decodes and rounds: a gradient in memory, then one sweep (`compressed_step`)."""
    return dtype is torch.bfloat16 or (
        config.states > 0 and state_format(numel, dtype, config) != "fp32")


class OptimCall(NamedTuple):
    """An optimizer's numbers at one of its steps (csrc/params.h: OptimParams)."""

    kind: int
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    momentum: float
    nesterov: bool
    step: int


def optim_call(optim: OptimConfig, step: int) -> OptimCall:
    """The flat form of `optim` at its `step`-th update (1 at the first)."""
    return OptimCall(OPTIM_CODES[optim.kind], optim.lr, optim.weight_decay, *optim.betas,
                     optim.eps, optim.momentum, optim.nesterov, step)


def row_of(optim: OptimConfig, step: int) -> tuple[float, float, float]:
    """What of an update changes from one to the next, in double: decay (times the rate for adamw),
    step size, root of the second moment's bias correction (csrc/params.h: OptimParams.row)."""
    if optim.kind == "sgd":
        return optim.weight_decay, optim.lr, 1.0
    decay = optim.weight_decay * (optim.lr if optim.kind == "adamw" else 1.0)
    beta1, beta2 = optim.betas
    return decay, optim.lr / (1.0 - beta1**step), math.sqrt(1.0 - beta2**step)
