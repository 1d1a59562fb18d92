"""Recurrent schedule (FFRNN): every frame updates every layer from the frame's old states.

    sweep once; then for each frame, for each layer i:
        u = n(h_{i-1}), n(h_{i+1}) -> a -> local_pass with h_i blended in -> update
        h_i' by the updated weights, from the old states; it takes the place of h_i as soon as
        the layer above has seen that

Buffers: h the states of image, layers and label, l their lengths, t{i} the new state of layer i;
u{i}, a{i} and d{i} as in program.py.
"""

from __future__ import annotations

from ffengine.engine.compiling import Layers
from ffengine.engine.memory.plan import Plan
from ffengine.engine.program import Facts, Instruction, Loop, Part, Program, finished
from ffengine.engine.schedules.schedule import Schedule
from ffengine.nn.network import LocalNet
from ffengine.nn.recurrent import RecurrentNet
from ffengine.typed import typed


class Recurrent(Schedule):
    """Every batch over `frames` frames (K_train)."""

    recurrent = True
    tiles = False
    adds_up = False  # every frame updates

    @typed("schedule")
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

    def compile(self, net: LocalNet, plan: Plan, facts: Facts) -> Program:
        """The batch's frames, one after the other."""
        depth = range(len(net.layers))
        lines = Layers(net, facts, "h", None)
        for i in depth:
            lines.add("first_state", i, h="h", lengths="l")
        parts: list[Part] = [Instruction("states", 0, (("batch", "batch"),), ("h", "l")),
                             Loop(lines.take(), facts.rows, title="first sweep")]
        for frame in range(self.frames):
            for i in depth:
                lines.add("around", i, f"u{i}", h="h", lengths="l")
                if i:  # the last that wanted the old state below has seen it
                    lines.add("switch", i, h="h", lengths="l", below=f"t{i - 1}")
                lines.add("forward", i, f"a{i}", u=f"u{i}")
                lines.add("local_pass", i, f"d{i}", a=f"a{i}", states="h")
                lines.add("update", i, u=f"u{i}", d=f"d{i}")
                lines.add("new_state", i, f"t{i}", u=f"u{i}", h="h")
            lines.add("switch", depth[-1], h="h", lengths="l", own=f"t{depth[-1]}")
            parts.append(Loop(lines.take(), facts.rows, title=f"frame {frame}"))
        parts.append(Instruction("mean_of_frames", 0))
        return finished(parts, facts)
