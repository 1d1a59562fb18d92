"""Local layers: a linear map or a convolution whose neurons form class groups.

A layer owns weights and the settings of its `local_pass`; how it is trained lives in
`ffengine.engine`, how layers are wired in `ffengine.nn.network`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ffengine.nn.checks import positive
from ffengine.nn.convolution import convolve
from ffengine.nn.drawing import he_normal
from ffengine.nn.norms import Normalised, PreNorm
from ffengine.ops import product
from ffengine.ops.batch_pass import batch_pass
from ffengine.ops.config import BatchNorm, Dropout, LocalPassConfig, Norm, Peer
from ffengine.ops.local_pass import local_pass
from ffengine.ops.tracing import traced
from ffengine.ops.weight_update import ConvGeometry
from ffengine.reference import local_pass as reference
from ffengine.reference.norms import batch_normed
from ffengine.typed import typed

#: What the batch's other samples do to a sample, between activation and goodness.
Coupling = BatchNorm | Peer
Init = Literal["he", "torch"]
#: Rows up to which the library is faster with the weight as the left factor; 2000 -> 2000, fp32, 1
#: thread, AVX-512, ms of W uᵀ against u Wᵀ: 10 rows 1.2 | 2.2, 20 rows 1.7 | 1.7, 40 rows 2.4 | 2.5
FEW_ROWS = 16


class Operands(NamedTuple):
    """A layer's weight, bias and what a folded norm's bias adds to every pre-activation."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    shift: torch.Tensor | None


class LocalLayer(nn.Module):
    """Base of the local layers: weight, optional bias, and the settings of the sweep.

    x -> [pre_norm] -> weight, bias -> a -> sweep (activation, pool, goodness, loss, norm) -> z

    `weight` is fp32 (fp64 for the reference; bf16 in runs that keep it so) and, for convolutions,
    channels_last in memory.

    Args:
        out: C, the neurons (units or channels) of the layer.
        config: groups, goodness, loss, norm, pool of the sweep.
        dropout: drop probability in training.
        pre_norm: normalisation of the input (Trifecta).
        batch_coupling: BatchNorm between activation and goodness (SN, CwComp), or peer
            normalisation.

    Attributes:
        label_map: int64 (classes,), the label this layer is trained on for each class
            (super-classes), or None.
        optim: hyper-parameters that differ from the run's, as keywords of OptimConfig.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    geometry: ConvGeometry | None = None
    #: How the weights were drawn, and those of units that are added are.
    init: Init
    label_map: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None

    def __init__(self, out: int, config: LocalPassConfig, dropout: float = 0.0,
                 pre_norm: PreNorm | None = None, batch_coupling: Coupling | None = None) -> None:
        super().__init__()
        Dropout(dropout)  # validates the probability
        config.offsets(out)
        self.config, self.dropout = config, dropout
        self.pre_norm, self.batch_coupling = pre_norm, batch_coupling
        self.optim: dict[str, Any] = {}
        #: The last that `settings` made, and of what: a step read from memory asks for them again.
        self._settings: tuple[Any, LocalPassConfig] | None = None
        affine = isinstance(batch_coupling, BatchNorm)
        self.norm_weight = nn.Parameter(torch.ones(out)) if affine else None
        self.norm_bias = nn.Parameter(torch.zeros(out)) if affine else None
        # peers start at one half, as the published code has it
        mean = torch.zeros(out) if affine else torch.full((out,), 0.5)
        self.register_buffer("running_mean", None if batch_coupling is None else mean)
        self.register_buffer("running_var", torch.ones(out) if affine else None)
        self.register_buffer("label_map", None)

    @property
    def uses_batch_statistics(self) -> bool:
        """In training a sample's update depends on the batch's other samples."""
        batch = self.batch_coupling is not None and not (
            isinstance(self.batch_coupling, BatchNorm) and self.batch_coupling.use_running)
        return batch or (self.pre_norm is not None and self.pre_norm.uses_batch_statistics)

    @property
    def units(self) -> int:
        """C, the neurons (units or channels) of the layer."""
        return self.weight.shape[0]

    @property
    def in_size(self) -> int:
        """Channels or features of an input."""
        groups = 1 if self.geometry is None else self.geometry.groups
        return self.weight.shape[1] * groups

    def relabel(self, label_map: Sequence[int]) -> None:
        """Train this layer on label_map[class] (super-classes); groups must cover them."""
        groups = len(self.config.offsets(self.weight.shape[0])) - 1
        if not label_map or min(label_map) < 0 or max(label_map) >= groups:
            raise ValueError(f"[layer] a label map expected values in [0, {groups}), got "
                             f"{tuple(label_map)}")
        self.label_map = torch.tensor(tuple(label_map), device=self.weight.device)

    def labels(self, y: torch.Tensor) -> torch.Tensor:
        """What the layer is trained towards, of classes y (N,): its super-classes, or y itself."""
        return y if self.label_map is None else self.label_map[y]

    def enter(self, x: torch.Tensor, training: bool) -> tuple[torch.Tensor, Normalised | None]:
        """(what the weight sees of x, what the affine gradients need of it)."""
        if self.pre_norm is None:
            return x, None
        made = self.pre_norm.normalise(x, training)
        if self.pre_norm.folded:
            return as_laid_out(made.x_hat), made
        return as_laid_out(self.pre_norm.affine(made.x_hat)), made

    def operands(self, u: torch.Tensor, half: torch.Tensor | None = None) -> Operands:
        """What `preactivation` multiplies and adds, in u's dtype; tiles share it.

        Args:
            half: the weight in u's dtype, where somebody keeps it; a folded norm has no use for it.
        """
        bias = None if self.bias is None else self.bias.detach().to(u.dtype)
        weight = self.weight.detach() if half is None else half
        norm = self.pre_norm
        if norm is None or not norm.folded:
            return Operands(weight.to(u.dtype), bias, None)
        weight = self.weight.detach()
        columns = (1, -1, *[1] * (weight.dim() - 2))
        weight = weight.to(norm.weight.dtype)  # a bf16 weight is not to round the shift too
        constant = norm.bias.detach().view(columns).expand(1, -1, *u.shape[2:])
        shift = self.apply_weight(as_laid_out(constant.to(weight.dtype)), weight, None)
        # in a's own dtype and layout: 1 ms instead of 13 beside a 16-bit convolution's 0.5
        return Operands((weight * norm.weight.detach().view(columns)).to(u.dtype), bias,
                        as_laid_out(shift.to(u.dtype)))

    def preactivation(self, u: torch.Tensor, operands: Operands | None = None) -> torch.Tensor:
        """a of what `enter` gave, in its dtype."""
        given = self.operands(u) if operands is None else operands
        a = self.apply_weight(u, given.weight, given.bias)
        return a if given.shift is None else a.add_(given.shift)

    def apply_weight(self, u: torch.Tensor, weight: torch.Tensor,
                     bias: torch.Tensor | None) -> torch.Tensor:
        """The linear map or convolution of u, all of one dtype."""
        raise TypeError(f"[{type(self).__name__}] expected a layer with an apply_weight")

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Per-sample shape of a, from the per-sample shape of x."""
        raise TypeError(f"[{type(self).__name__}] expected a layer with an out_shape")

    def z_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Per-sample shape of z, from the per-sample shape of x."""
        a = self.out_shape(shape)
        return (a[0], *(s // 2 for s in a[1:])) if self.config.pool == "max2" else a

    def settings(self, seed: int = 0, index: int = 0, step: int = 0) -> LocalPassConfig:
        """The sweep's settings in one training step; without dropout they never change."""
        if self.dropout == 0.0:
            return self.config
        key = (self.config, self.dropout, seed, index, step)
        if self._settings is None or self._settings[0] != key:
            drop = Dropout(self.dropout, seed, index, step)
            self._settings = key, replace(self.config, dropout=drop)
        return self._settings[1]

    def infer(self, x: torch.Tensor, *, want_z: bool = True, training: bool = False,
              norm: Norm | None = None, shortcut: torch.Tensor | None = None,
              half: torch.Tensor | None = None,
              backend: str = "auto") -> tuple[torch.Tensor | None, torch.Tensor]:
        """(z, g) of the layer's input, no loss and no dropout.

        Args:
            training: use (and move) batch statistics where the layer has them.
            norm: feature normalisation in place of the layer's own; Norm("none") gives h.
            shortcut: added to z.
            half: see `operands`.
        """
        u = self.enter(x, training)[0]
        return self.sweep(self.preactivation(u, self.operands(u, half)), want_z=want_z,
                          training=training, norm=norm, shortcut=shortcut, backend=backend)

    def sweep(self, a: torch.Tensor, *, want_z: bool = True, training: bool = False,
              norm: Norm | None = None, shortcut: torch.Tensor | None = None,
              backend: str = "auto") -> tuple[torch.Tensor | None, torch.Tensor]:
        """(z, g) of the pre-activation; arguments as `infer`."""
        config = self.config if norm is None else replace(self.config, norm=norm)
        if traced():  # those who trace see plain PyTorch
            seen, g = self._traced(a, config, training)
            return seen if shortcut is None else seen + shortcut, g
        if isinstance(self.batch_coupling, BatchNorm):
            held = (self.norm_weight, self.norm_bias, self.running_mean, self.running_var)
            if not training and self.weight.element_size() == 2:  # net.half(): the op takes fp32
                held = tuple(t if t is None else t.float() for t in held)  # type: ignore[assignment]
            gamma, beta, mean, var = held
            made = batch_pass(
                a, config=config, coupling=self.batch_coupling, gamma=gamma, beta=beta,
                running_mean=mean, running_var=var, training=training, want_z=want_z,
                backend=backend)
            z = made.z
            if z is not None and shortcut is not None:
                z = z + shortcut if torch.is_grad_enabled() else z.add_(shortcut)
            return z, made.g
        return local_pass(a, config=config, want_z=want_z, shortcut=shortcut,
                          backend=backend)[:2]

    def _traced(self, a: torch.Tensor, config: LocalPassConfig,
                training: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """`sweep` as plain PyTorch that moves no running statistics."""
        coupling = self.batch_coupling
        if not isinstance(coupling, BatchNorm):
            return traced_pass(a, config)
        running = (None, None) if training and not coupling.use_running else (
            self.running_mean, self.running_var)
        z = batch_normed(F.relu(a), config, coupling, running, (self.norm_weight, self.norm_bias),
                         running[0] is None)
        return z, traced_goodness(z, config)


class LocalConv2d(LocalLayer):
    """conv -> sweep (CW-Conv of DeeperForward, sec. 3.2).

    `groups` are the convolution's channel groups (CFSE); other arguments as LocalLayer's.
    """

    @typed("LocalConv2d")
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1,
                 padding: int | None = None, groups: int = 1, bias: bool = False,
                 dropout: float = 0.0, config: LocalPassConfig | None = None,
                 pre_norm: PreNorm | None = None, batch_coupling: Coupling | None = None,
                 init: Init = "he") -> None:
        positive("LocalConv2d", in_channels=in_channels, out_channels=out_channels,
                 kernel_size=kernel_size, stride=stride, groups=groups)
        super().__init__(out_channels, config or LocalPassConfig(), dropout, pre_norm,
                         batch_coupling)
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"[conv] channels must be a multiple of the {groups} groups, got "
                             f"{in_channels} -> {out_channels}")
        padding = kernel_size // 2 if padding is None else padding
        self.geometry, self.init = ConvGeometry(
            (kernel_size, kernel_size), stride, padding, groups), init
        self.weight, self.bias = initial(
            (out_channels, in_channels // groups, kernel_size, kernel_size), bias, init)

    def apply_weight(self, u: torch.Tensor, weight: torch.Tensor,
                     bias: torch.Tensor | None) -> torch.Tensor:
        geometry = self.geometry
        assert geometry is not None
        return convolve(u, weight, bias, geometry)

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        geometry = self.geometry
        assert geometry is not None
        size = [(s + 2 * geometry.padding - k) // geometry.stride + 1
                for s, k in zip(shape[1:], geometry.kernel, strict=True)]
        return (self.units, *size)

    def extra_repr(self) -> str:
        g = self.geometry
        assert g is not None
        return f"{self.in_size}, {self.units}, {g.kernel[0]}, stride={g.stride}"


class LocalLinear(LocalLayer):
    """linear -> sweep; input (N, in_features), maps are flattened."""

    @typed("LocalLinear")
    def __init__(self, in_features: int, out_features: int, *, bias: bool = True,
                 dropout: float = 0.0, config: LocalPassConfig | None = None,
                 pre_norm: PreNorm | None = None, batch_coupling: Coupling | None = None,
                 init: Init = "he") -> None:
        positive("LocalLinear", in_features=in_features, out_features=out_features)
        super().__init__(out_features, config or LocalPassConfig(), dropout, pre_norm,
                         batch_coupling)
        self.init: Init = init
        self.weight, self.bias = initial((out_features, in_features), bias, init)

    def apply_weight(self, u: torch.Tensor, weight: torch.Tensor,
                     bias: torch.Tensor | None) -> torch.Tensor:
        # compilers first: a look at the batch size would bind an exported program to it
        if not traced() and 1 < u.shape[0] <= FEW_ROWS and (
                u.device.type == "cpu" and u.dtype is torch.float32 and not product.mkl_lags()):
            a = torch.mm(weight, u.t()).t().contiguous()
            return a if bias is None else a.add_(bias)
        return product.linear(u, weight, bias)

    def of_halves(self, u: torch.Tensor, columns: slice) -> torch.Tensor:
        """`preactivation` of rows (2N, in) whose halves differ in `columns` alone.

        What they share is multiplied once: 2 x 128 rows, 794 -> 2000, 2.9 ms instead of 5.1.
        """
        (weight, bias, _), n = self.operands(u), u.shape[0] // 2
        a = u.new_empty(2 * n, self.units)
        positive, negative = a.chunk(2)
        torch.mm(u[:n], weight.t(), out=positive)
        if bias is not None:
            positive.add_(bias)
        torch.addmm(positive, u[n:, columns] - u[:n, columns], weight[:, columns].t(),
                    out=negative)
        return a

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.units,)

    def extra_repr(self) -> str:
        return f"{self.in_size}, {self.units}"


def traced_pass(a: torch.Tensor, config: LocalPassConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(z, g) of the reference, without loss and dropout."""
    h = F.relu(a.double() if a.dtype is torch.float64 else a.float())
    if config.pool == "max2":
        h = F.max_pool2d(h, 2)
    g, norm, groups = traced_goodness(h, config), config.norm, config.groups
    if isinstance(groups, int) and (norm.kind == "group" or norm.scope == "group"):
        rows = by_group(h, groups)
        z = reference.normalise(rows, (0, rows.shape[1]), config).reshape(h.shape)
    else:
        z = reference.normalise(h, config.offsets(h.shape[1]), config)
    return z.to(a.dtype), g


def traced_goodness(h: torch.Tensor, config: LocalPassConfig) -> torch.Tensor:
    """g (N, K) of h; equal groups as rows of one view, or a graph would hold a loop over them."""
    if not isinstance(config.groups, int):
        return reference.goodness(h, config.offsets(h.shape[1]), config.goodness)
    rows = by_group(h, config.groups)
    return reference.goodness(rows, (0, rows.shape[1]), config.goodness).reshape(
        h.shape[0], config.groups)


def by_group(h: torch.Tensor, groups: int) -> torch.Tensor:
    """(N K, C / K, ...) of h (N, C, ...)."""
    return h.reshape(h.shape[0] * groups, h.shape[1] // groups, *h.shape[2:])


def initial(shape: tuple[int, ...], bias: bool,
            init: Init) -> tuple[nn.Parameter, nn.Parameter | None]:
    """(weight, bias): "he" is He-normal, fan_out, with zero biases (DeeperForward); "torch" is
    uniform within 1 / sqrt(fan_in) for both, torch's own."""
    weight = torch.empty(shape)
    offset = torch.zeros(shape[0])
    if init == "he":
        he_normal(weight)
    elif init == "torch":
        bound = (weight[0].numel()) ** -0.5
        nn.init.uniform_(weight, -bound, bound)
        nn.init.uniform_(offset, -bound, bound)
    else:
        raise ValueError(f"[layer] init must be he or torch, got {init!r}")
    if weight.dim() == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(weight), nn.Parameter(offset) if bias else None


def as_channels_last(x: torch.Tensor) -> torch.Tensor:
    """A map (N, C, H, W) in channels_last, its strides unmistakable.

    With one channel both layouts are the same memory; torch then sees a contiguous map and the
    library would answer in that layout, through reordered copies of the whole batch.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    _, channels, h, w = x.shape
    return x.as_strided(x.shape, (h * w, 1, w, 1)) if channels == 1 else x


def as_laid_out(x: torch.Tensor) -> torch.Tensor:
    """x as the weights' kernels want it: maps channels_last, the rest contiguous."""
    return as_channels_last(x) if x.dim() == 4 else x.contiguous()


def keep_weights_channels_last(module: nn.Module, *_: Any) -> None:
    """Restore the weights' memory layout after loading or moving (values are untouched)."""
    for layer in module.modules():
        if isinstance(layer, LocalConv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
