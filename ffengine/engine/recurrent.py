"""Recurrent schedule (FFRNN): every frame updates every layer from the frame's old states.

    sweep once; then for each frame, for each layer i:
        a = n(h_{i-1}), n(h_{i+1}) -> local_pass with h_i blended in -> weight_update
        h_i' by the updated weights, from the old states; all states switch at the frame's end
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ffengine.data.seeding import generator
from ffengine.engine import affine
from ffengine.engine.affine import Swept
from ffengine.engine.batch import Batch
from ffengine.engine.context import BatchReport, StepContext
from ffengine.engine.inputs import drawn
from ffengine.engine.plan import Plan
from ffengine.engine.schedule import Schedule
from ffengine.nn.recurrent import RecurrentNet, label_rows, length_normalised
from ffengine.ops.host import send
from ffengine.ops.local_pass import local_pass

if TYPE_CHECKING:
    from ffengine.nn.network import LocalNet


@dataclass
class Frame:
    """What a frame's updates saw: per layer goodness (2N, 1) and loss (2N,), positives first."""

    goodness: list[torch.Tensor]
    losses: list[torch.Tensor]


class Recurrent(Schedule):
    """Every batch over `frames` frames (K_train)."""

    recurrent = True
    tiles = False
    adds_up = False  # every frame updates

    def __init__(self, frames: int = 10) -> None:
        if frames < 1:
            raise ValueError("[schedule] recurrent training expected 1 frame or more, got "
                             f"{frames}")
        self.frames = self.updates = frames

    def begin(self, net: LocalNet, epochs: int) -> None:
        if not isinstance(net, RecurrentNet):
            raise ValueError("[schedule] recurrent training expected a RecurrentNet, got "
                             f"{type(net).__name__}")
        super().begin(net, epochs)

    def train(self, ctx: StepContext, item: Batch, plan: Plan, dtype: torch.dtype) -> BatchReport:
        losses: list[torch.Tensor] = []
        for frame in self.run(ctx, item, dtype):
            losses.append(torch.stack(frame.losses))
            ctx.goodness = {i: [g] for i, g in enumerate(frame.goodness)}
        ctx.loss_sum = dict(enumerate(torch.stack(losses).mean((0, 2)).unbind()))
        return ctx.report()

    @torch.no_grad()
    def run(self, ctx: StepContext, item: Batch, dtype: torch.dtype) -> Iterator[Frame]:
        """The batch's frames, one at a time, each with its updates made."""
        net = ctx.net
        assert isinstance(net, RecurrentNet)
        x = item.x.to(dtype)
        n = x.shape[0]
        other = item.negatives if item.negatives is not None else drawn(ctx, item, dtype)
        labels = torch.cat([label_rows(t, net.num_classes, dtype) for t in (item.y, other)])
        ctx.y = torch.cat([item.y.new_ones(n), item.y.new_zeros(n)])
        h, unit = net.ends(torch.cat([x, x]), labels, self._states(ctx, item, n, x))
        net.sweep_once(h, unit, ctx.backend)
        for _ in range(self.frames):
            yield self.frame(ctx, net, h, unit)
        ctx.optimizer.mark_stepped()

    def _states(self, ctx: StepContext, item: Batch, n: int, x: torch.Tensor) -> list[torch.Tensor]:
        """Initial states (2N, units): given, or uniform in [0, 1), one draw for all samples."""
        net = ctx.net
        assert isinstance(net, RecurrentNet)
        if item.hidden is not None:
            halves = item.hidden
        else:
            source = generator("hidden", ctx.seed, ctx.step)
            halves = [[torch.rand(1, w, generator=source, dtype=torch.float32)
                       for w in net.widths] for _ in range(2)]
        return [torch.cat([send(t, x.device).to(x.dtype).expand(n, -1) for t in pair])
                for pair in zip(*halves, strict=True)]

    def frame(self, ctx: StepContext, net: RecurrentNet, h: list[torch.Tensor],
              unit: list[torch.Tensor]) -> Frame:
        """Update every layer from states h (their normalised form: unit), and both in place."""
        frame, states = Frame([], []), []
        for i in range(len(net.layers)):
            layer, u = net.layer(i), net.around(i, unit)
            state = h[i + 1].contiguous()
            made = local_pass(layer.preactivation(u), ctx.y, config=layer.config, h_prev=state,
                              want_z=False, want_da=True, backend=ctx.backend)
            assert made.loss is not None
            affine.update(ctx, i, u, None, Swept(None, made.g, made.loss, made.da, made.da_scale))
            states.append(net.new_state(i, unit, state, ctx.backend)[0])
            frame.goodness.append(made.g)
            frame.losses.append(made.loss)
        h[1:-1] = states
        unit[1:-1] = [length_normalised(z) for z in states]
        return frame
