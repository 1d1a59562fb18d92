"""Residual chains with parameter-free shortcuts, as rows of convolutions and their wires."""

from __future__ import annotations

from ffengine.nn.chain import Wire
from ffengine.nn.checks import as_many

#: (in channels, out channels, kernel, stride) of a convolution.
Row = tuple[int, int, int, int]


def residual_blocks(in_channels: int, planes: tuple[int, ...], counts: tuple[int, ...], *,
                    bottleneck: bool, shortcuts: bool) -> tuple[list[Row], list[Wire]]:
    """Stem 3x3, then residual blocks whose shortcut joins at the block's last conv.

    DeeperForward, eq. 10 and 11: where channels differ the last conv yields C - C_in of them and
    the shortcut is concatenated; the shortcut is pooled once, where a stage ends.
    """
    as_many("residual", "counts of blocks", counts, len(planes))
    rows: list[Row] = [(in_channels, planes[0], 3, 1)]
    wires, last = [Wire(branch=shortcuts)], planes[0]
    for stage, (width, count) in enumerate(zip(planes, counts, strict=True)):
        out = width * 4 if bottleneck else width
        for block in range(count):
            stride = 2 if stage and block == 0 else 1
            concat = shortcuts and last != out
            final = out - last if concat else out
            if bottleneck:
                rows += [(last, width, 1, 1), (width, width, 3, stride), (width, final, 1, 1)]
                wires += [Wire(), Wire()]
            else:
                rows += [(last, width, 3, stride), (width, final, 3, 1)]
                wires += [Wire()]
            end = stage < len(planes) - 1 and block == count - 1
            wires.append(Wire(join="concat" if concat else "add", branch=True, branch_pool=end)
                         if shortcuts else Wire())
            last = out
    return rows, wires
