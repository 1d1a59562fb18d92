"""ResNet-18 beside a transcription in torch's own modules: logits, gradients, statistics, size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ffengine as ff
from ffengine.nn.resnet import ResNet


class Basic(nn.Module):
    """torchvision's block, its downsampling included."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.downsample = nn.Sequential()
        if ins != outs or stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False),
                                            nn.BatchNorm2d(outs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.downsample(x))


class Published(nn.Module):
    def __init__(self, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(
            widths[0])
        ins = (widths[0], *widths)
        self.stages = nn.Sequential(*(
            nn.Sequential(Basic(ins[i], w, 2 if i else 1), Basic(w, w, 1))
            for i, w in enumerate(widths)))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(h, 1).flatten(1))


def pairs(net: ResNet, plain: Published) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same tensors of both, parameters and running statistics."""
    def conv(ours, weight, norm):
        return [(ours.weight, weight), (ours.norm_weight, norm.weight),
                (ours.norm_bias, norm.bias), (ours.running_mean, norm.running_mean),
                (ours.running_var, norm.running_var)]

    found = conv(net.stem, plain.conv1.weight, plain.bn1)
    for ours, theirs in zip(net.blocks, [b for s in plain.stages for b in s], strict=True):
        found += conv(ours.first, theirs.conv1.weight, theirs.bn1)
        found += conv(ours.second, theirs.conv2.weight, theirs.bn2)
        assert (ours.shortcut is None) == (len(theirs.downsample) == 0)
        if ours.shortcut is not None:
            found += conv(ours.shortcut, theirs.downsample[0].weight, theirs.downsample[1])
    classifier = net.layer(0)
    return [*found, (classifier.weight, plain.fc.weight), (classifier.bias, plain.fc.bias)]


def test_it_is_the_published_network() -> None:
    torch.manual_seed(0)
    widths = (4, 6, 8, 10)
    net = ff.models.create("bp/deeperforward/resnet18", num_classes=5, image_size=16,
                           widths=widths).double()
    plain = Published(widths, 5).double()
    both = pairs(net, plain)
    assert {id(ours) for ours, _ in both} == {
        id(t) for t in (*net.parameters(), *net.buffers())}
    with torch.no_grad():
        for ours, theirs in both:
            theirs.copy_(ours)
    trainer = ff.Trainer(net, epochs=3, lr=0.01, precision="fp64", progress=False)
    adam = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=5e-4)
    for step in range(3):
        x = torch.rand(6, 3, 16, 16, dtype=torch.float64)
        y = torch.randint(5, (6,))
        adam.zero_grad()
        loss = F.cross_entropy(plain(x), y)
        loss.backward()
        for group in adam.param_groups:
            group["lr"] = trainer.rate.now
        adam.step()
        report = trainer.step(x, y, iteration=step)
        torch.testing.assert_close(report.losses[0], loss.detach(), rtol=1e-9, atol=1e-9)
    for ours, theirs in both:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    plain.eval()
    torch.testing.assert_close(net(x), plain(x).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("classes, channels, count", [(10, 3, 11_173_962), (100, 3, 11_220_132),
                                                      (10, 1, 11_172_810)])
def test_parameters_of_the_full_network(classes: int, channels: int, count: int) -> None:
    with torch.device("meta"):
        net = ff.models.create("bp/deeperforward/resnet18", num_classes=classes,
                               in_channels=channels)
    assert sum(p.numel() for p in net.parameters()) == count


def test_stages_that_do_not_match_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"^\[resnet\] expected as many widths as counts") as error:
        ff.models.create("bp/deeperforward/resnet18", widths=(8, 8))
    assert "\n" not in str(error.value)
