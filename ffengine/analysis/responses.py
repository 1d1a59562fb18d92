"""Mean response of every neuron to every class, from running sums (support neurons, app. D.1).

A neuron is a unit, or a channel whose response is its mean over the pixels. Only sums by class are
kept: (classes, neurons) numbers a layer, however many samples pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ffengine.nn.maps import Label, Samples, layer_maps, over_pixels
from ffengine.nn.network import LocalNet


@dataclass
class LayerSums:
    """Sums of one layer over the samples of each class, fp64 on the CPU.

    plain, magnitude, square: (classes, neurons) sums of h, |h| and h², each a mean over pixels.
    counts: (classes,) samples. active: (neurons,) share of samples and pixels with h above 0,
    times samples. offsets: where the support-neuron sets begin and end, (0, neurons) without sets.
    goodness: what the layer's goodness takes of h.
    """

    plain: torch.Tensor
    magnitude: torch.Tensor
    square: torch.Tensor
    counts: torch.Tensor
    active: torch.Tensor
    offsets: tuple[int, ...]
    goodness: str

    @property
    def neurons(self) -> int:
        return self.plain.shape[1]

    def mean_response(self) -> torch.Tensor:
        """(classes, neurons): mean of h where the goodness is a mean, of h² where it is of squares.

        NaN for a class without samples.
        """
        sums = self.plain if self.goodness == "mean" else self.square
        return sums / self.counts[:, None].where(self.counts[:, None] > 0, torch.nan)

    def inactive(self) -> float:
        """Mean share of the layer's responses that are 0: its ratio of deactivated neurons
        (DeeperForward, app. I)."""
        return 1 - float(self.active.mean() / self.counts.sum())

    def dead(self) -> int:
        """Neurons that no sample activates."""
        return int((self.active == 0).sum())

    def set_of(self) -> torch.Tensor | None:
        """(neurons,) the set, that is the class, of each neuron; None without sets."""
        if len(self.offsets) != len(self.counts) + 1:
            return None
        sizes = torch.tensor(self.offsets).diff()
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)


def gather(net: LocalNet, samples: Samples, *, label: Label = "zero",
           backend: str = "auto") -> list[LayerSums]:
    """The sums of every layer over (x, y) batches.

    Raises:
        ValueError: no samples.
    """
    sums: list[LayerSums] = []
    net.eval()
    for x, y in samples:
        belongs = torch.nn.functional.one_hot(y, net.num_classes)
        for i, maps in enumerate(layer_maps(net, x, y, label=label, backend=backend)):
            if i == len(sums):
                sums.append(_empty(net, i, maps.h.shape[1]))
            _add(sums[i], maps.h, belongs)
    if not sums:
        raise ValueError("[responses] expected one sample or more, got none")
    return sums


def _empty(net: LocalNet, i: int, neurons: int) -> LayerSums:
    config = net.layer(i).config
    none = torch.zeros(net.num_classes, neurons, dtype=torch.float64)
    return LayerSums(none, none.clone(), none.clone(), none[:, 0].clone(), none[0].clone(),
                     config.offsets(neurons), config.goodness)


def _add(sums: LayerSums, h: torch.Tensor, belongs: torch.Tensor) -> None:
    rows = belongs.t().to(h.dtype)
    for total, part in ((sums.plain, h), (sums.magnitude, h.abs()), (sums.square, h * h)):
        total += (rows @ over_pixels(part)).double().cpu()
    sums.active += over_pixels((h > 0).to(h.dtype)).sum(0).double().cpu()
    sums.counts += belongs.sum(0).cpu()
