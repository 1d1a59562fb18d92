"""Backpropagation as a schedule: the twin of a network, trained end to end by cross-entropy."""

from __future__ import annotations

from ffengine.engine import label_channel
from ffengine.engine.memory.plan import Plan
from ffengine.engine.program import Facts, Instruction, Program, finished
from ffengine.engine.schedules.schedule import Schedule
from ffengine.nn.network import LocalNet


class Backprop(Schedule):
    """Every batch trains all parameters on one loss, the cross-entropy of the scores."""

    recurrent = True

    planned = False
    adds_up = False

    def begin(self, net: LocalNet, epochs: int) -> None:
        if label_channel.learned(net) is not None:
            raise ValueError("[schedule] backpropagation expected a network whose label channel is "
                             "fixed, as its twin's is, got a learned one")
        super().begin(net, epochs)

    def compile(self, net: LocalNet, plan: Plan, facts: Facts) -> Program:
        last = len(net.layers) - 1
        return finished([
            Instruction("backpropagate", last, (("batch", "batch"),), ("gradients",)),
            Instruction("update_all", last, (("gradients", "gradients"),))], facts)
