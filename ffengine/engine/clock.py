"""What changes from one step to the next, in one small table on the device that kernels read.

    row 0             dropout's step, an int32
    a row an update   ffengine.ops.optim.row_of, and in the last place the update's number, an int32

Launches then have the same arguments at every step: a captured step is right when it is replayed,
and the host copies one table where it would write numbers into hundreds of launches.
"""

from __future__ import annotations

import torch

from ffengine.engine.optim import LocalOptimizer
from ffengine.ops.host import send
from ffengine.ops.optim import OptimConfig, OptimState, row_of

WIDTH = 8
Row = list[float]


class StepClock:
    """The table of one optimizer's steps.

    Args:
        updates: that a step makes of a parameter (frames of a recurrent network).
    """

    def __init__(self, optimizer: LocalOptimizer, device: torch.device, updates: int = 1) -> None:
        self.optimizer, self.device, self.updates = optimizer, device, updates
        self._states: list[OptimState] = []
        self.table = torch.empty(0, WIDTH, device=device)
        #: int32 (1,): the step of dropout's masks.
        self.dropout = torch.empty(0, dtype=torch.int32, device=device)

    def begin(self, step: int) -> None:
        """Write the numbers of step number `step`, and of every update it will make."""
        states = self.optimizer.states
        if [id(s) for s in states.values()] != [id(s) for s in self._states]:
            self._lay_out(list(states.values()))
        rows, numbers = [[0.0] * WIDTH], [step]
        known: dict[tuple[OptimConfig, int], Row] = {}
        for name, state in states.items():
            optim = self.optimizer.config_of(name)
            state.first = state.step + 1
            for number in range(state.first, state.first + self.updates):
                key = (optim, number)
                if key not in known:
                    known[key] = [*row_of(optim, number), *[0.0] * (WIDTH - 3)]
                rows.append(known[key])
                numbers.append(number)
        made = torch.tensor(rows, dtype=torch.float32)
        made.view(torch.int32)[:, -1] = torch.tensor(numbers, dtype=torch.int32)
        self.table.copy_(send(made, self.device))

    def _lay_out(self, states: list[OptimState]) -> None:
        """A table with a place for every state's updates; its address then stays."""
        self._states = states
        self.table = torch.empty(1 + self.updates * len(states), WIDTH, device=self.device)
        self.dropout = self.table.view(torch.int32)[0, -1:]
        rows = self.table[1:].unbind()
        for i, state in enumerate(states):
            state.rows = rows[i * self.updates:(i + 1) * self.updates]


def clock_of(optimizer: LocalOptimizer, device: torch.device, updates: int) -> StepClock | None:
    """A GPU's; a CPU's kernels are given their numbers."""
    return StepClock(optimizer, device, updates) if device.type == "cuda" else None
