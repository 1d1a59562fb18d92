"""What public constructors and the trainer are given is checked before anything is made of it: one
line that says what was expected and what came, never Python's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import ffengine as ff
from ffengine import data
from ffengine.engine.run.recipe import Recipe
from ffengine.engine.schedules.cascade import Cascade
from ffengine.engine.schedules.layerwise import Layerwise
from ffengine.engine.schedules.recurrent import Recurrent
from ffengine.engine.schedules.schedule import Interleaved, Overlapping, Together
from ffengine.nn import (
    Concat,
    LabelChannel,
    LinearHead,
    LocalConv2d,
    LocalLinear,
    LocalNet,
    Overlay,
    PreNorm,
    Readout,
    Wire,
)
from ffengine.ops.config import (
    BatchNorm,
    Dropout,
    LocalPassConfig,
    Norm,
    Peer,
    bce,
    ce,
    margin,
    pvn,
)

CONFIG = LocalPassConfig(groups=2)


def layer(ins: int = 4) -> LocalLinear:
    return LocalLinear(ins, 4, config=CONFIG)


def net(layers: Any = None, **more: Any) -> LocalNet:
    return LocalNet([layer()] if layers is None else layers,
                    **{"num_classes": 2, "in_shape": (4,), **more})


def trainer(**more: Any) -> ff.Trainer:
    return ff.Trainer(net(), **{"progress": False, **more})


def images() -> Any:
    return data.load("synthetic", shape=(1, 4, 4), train=8, test=4).train


CASES: list[tuple[Callable[[], Any], str]] = [
    (lambda: LocalLinear("a", 4, config=CONFIG), "in_features expected a whole number, got 'a'"),
    (lambda: LocalLinear(4.0, 4, config=CONFIG), "in_features expected a whole number, got 4.0"),
    (lambda: LocalLinear(0, 4, config=CONFIG), "in_features expected 1 or more, got 0"),
    (lambda: LocalLinear(4, -4, config=CONFIG), "out_features expected 1 or more, got -4"),
    (lambda: LocalLinear(4), "missing a required argument: 'out_features'"),
    (lambda: LocalLinear(4, 4, config=3), "config expected a LocalPassConfig or None, got 3"),
    (lambda: LocalLinear(4, 4, config=CONFIG, init="zero"), "init must be he or torch"),
    (lambda: LocalLinear(4, 4, width=3), "got an unexpected keyword argument 'width'"),
    (lambda: LocalConv2d(1, 4, 0, config=CONFIG), "kernel_size expected 1 or more, got 0"),
    (lambda: LocalConv2d(1, 4, "3", config=CONFIG), "kernel_size expected a whole number"),
    (lambda: LocalConv2d(1, 4, 3, stride=0, config=CONFIG), "stride expected 1 or more, got 0"),
    (lambda: LocalConv2d(1, 4, 3, groups=0, config=CONFIG), "groups expected 1 or more, got 0"),
    (lambda: LocalConv2d(1, 4, 3, groups=3, config=CONFIG), "multiple of the 3 groups"),
    (lambda: LocalConv2d(1, 4, 3, dropout="x", config=CONFIG), "dropout expected a number"),
    (lambda: LocalConv2d(1, 4, 3, dropout=1.0, config=CONFIG), "p must lie in [0, 1), got 1.0"),
    (lambda: LocalConv2d(1, 5, 3, config=CONFIG), "multiple of the 2 groups, got 5"),
    (lambda: net([]), "[network]"),
    (lambda: net([torch.nn.Linear(4, 4)]), "layers expected a list of LocalLayer objects"),
    (lambda: net(3), "layers expected a list of LocalLayer objects, got 3"),
    (lambda: net(in_shape=4), "in_shape expected a tuple of whole numbers, got 4"),
    (lambda: net(in_shape=(5,)), "layer 0 expected an input of 4"),
    (lambda: net(num_classes=0), "num_classes expected 1 or more, got 0"),
    (lambda: net(input_norm="batch"), "input_norm must be one of layer, none, got 'batch'"),
    (lambda: net(layer_range=(0, 4)), "layer range must satisfy"),
    (lambda: net(wires=[Wire(), Wire()]), "expected one wire a layer (1), got 2"),
    (lambda: net(readout="head"), "readout expected a Readout or None, got 'head'"),
    (lambda: net(colour=1), "got an unexpected keyword argument 'colour'"),
    (lambda: net().set_range(1, 0), "layer range must satisfy"),
    (lambda: net().set_range("a", "b"), "layer range must satisfy"),
    (lambda: net().cut(0), "a depth expected 1 to 1 layers, got 0"),
    (lambda: net().append(3), "layer expected a LocalLayer, got 3"),
    (lambda: net()([1, 2]), "input expected a floating-point tensor, got list"),
    (lambda: net()(torch.zeros(2, 4, dtype=torch.uint8)), "got torch.uint8"),
    (lambda: net()(torch.zeros(2, 3)), "expected input (N, 4), got (2, 3)"),
    (lambda: torch.jit.script(net()), "torch.jit.trace(net, x), torch.export and"),
    (lambda: Wire(join="sum"), "join expected one of none, add, concat, got 'sum'"),
    (lambda: Wire(pool_before="yes"), "pool_before expected True or False, got 'yes'"),
    (lambda: Norm("batch"), "kind must be one of none, group, layer, length"),
    (lambda: Norm("group", eps="x"), "eps expected a number, got 'x'"),
    (lambda: Norm("group", eps=-1.0), "eps expected 0 or more, got -1.0"),
    (lambda: Norm("length", scope="all"), "scope expected one of sample, group, got 'all'"),
    (lambda: LocalPassConfig(groups=2.0), "groups expected a whole number or a tuple"),
    (lambda: LocalPassConfig(groups=0).offsets(4), "multiple of the 0 groups"),
    (lambda: LocalPassConfig(norm="group"), "norm expected a Norm, got 'group'"),
    (lambda: LocalPassConfig(dropout=0.5), "dropout expected a Dropout, got 0.5"),
    (lambda: LocalPassConfig(blend=3.0), "blend expected 0 to 1, got 3.0"),
    (lambda: LocalPassConfig(loss="ce"), "loss must be a Loss or a function of (g, y), got str"),
    (lambda: Dropout("x"), "p must lie in [0, 1), got x"),
    (lambda: BatchNorm(momentum="x"), "momentum expected a number, got 'x'"),
    (lambda: BatchNorm(order="pool"), "order must be norm_pool or pool_norm, got 'pool'"),
    (lambda: Peer(weight=None), "weight expected a number, got None"),
    (lambda: pvn("x"), "pvn expected finite numbers, got ('x', 0.0, 0.0)"),
    (lambda: bce("x"), "width expected a number, got 'x'"),
    (lambda: margin(0.5), "group expected a whole number, got 0.5"),
    (lambda: ce("max"), "reduction expected mean or sum, got 'max'"),
    (lambda: LinearHead(3, 4, 2), "layers expected a list of whole numbers, got 3"),
    (lambda: LinearHead((0,), "4", 2), "in_features expected a whole number, got '4'"),
    (lambda: LinearHead((0,), -4, 2), "in_features expected 0 or more, got -4"),
    (lambda: Readout(theta="x"), "theta expected a number or None, got 'x'"),
    (lambda: PreNorm("x", (4,)), "'x'"),
    (lambda: PreNorm("batch", 4), "shape expected a tuple of whole numbers, got 4"),
    (lambda: Overlay("a", (4,)), "num_classes expected a whole number, got 'a'"),
    (lambda: Concat(4, 4), "in_shape expected a tuple of whole numbers, got 4"),
    (lambda: LabelChannel(4, (1, 4, 4), learned="no"), "learned expected True or False"),
    (lambda: Together("x"), "heads_from expected a number, got 'x'"),
    (lambda: Interleaved(3), "spans expected a list of"),
    (lambda: Interleaved((1, 2)), "spans expected a list of"),
    (lambda: Overlapping(3), "alternate expected one of batch, epoch, both, got 3"),
    (lambda: Layerwise(start="x"), "start expected a whole number, got 'x'"),
    (lambda: Recurrent("x"), "frames expected a whole number, got 'x'"),
    (lambda: Cascade(closed_form=3), "closed_form expected True or False, got 3"),
    (lambda: Recipe(lr="x"), "lr expected a number, got 'x'"),
    (lambda: trainer(recipe=Recipe(optimizer="lion")), "sgd, adam, adamw, got 'lion'"),
    (lambda: ff.Trainer(torch.nn.Linear(2, 2)), "net expected a LocalNet, got 'Linear'"),
    (lambda: ff.Trainer(), "missing a required argument: 'net'"),
    (lambda: trainer(learning_rate=1), "got an unexpected keyword argument 'learning_rate'"),
    (lambda: trainer(lr="x"), "lr expected a number or None, got 'x'"),
    (lambda: trainer(lr=-1), "lr must be a finite number of 0 or more, got -1"),
    (lambda: trainer(lr=float("nan")), "got nan"),
    (lambda: trainer(epochs=0), "epochs must be a whole number of at least 1, got 0"),
    (lambda: trainer(epochs=1.5), "epochs expected a whole number or None, got 1.5"),
    (lambda: trainer(batch_size="8"), "batch_size expected a whole number or None, got '8'"),
    (lambda: trainer(seed=-1), "seed must lie in 0..2^32 - 1, got -1"),
    (lambda: trainer(precision=["fp32"]), "precision expected a word, got ['fp32']"),
    (lambda: trainer(precision="fp8"), "precision must be one of fp64, fp32, bf16, fp16"),
    (lambda: trainer(backend=3), "backend expected a word, got 3"),
    (lambda: trainer(device="gpu"), "device expected cpu or cuda, got 'gpu'"),
    (lambda: trainer(device="meta"), "device expected one with memory, got meta"),
    (lambda: trainer(memory_budget="lots"), "440MB"),
    (lambda: trainer(micro_batch="2"), "micro_batch expected a whole number or None, got '2'"),
    (lambda: trainer(micro_batch=0), "expected 1 sample or more, got 0"),
    (lambda: trainer(states="int4"), "states must be one of fp32, bf16, 8bit, got 'int4'"),
    (lambda: trainer(costs="free"), "costs must be one of measured, modelled, got 'free'"),
    (lambda: trainer(out=3), "out expected a word or a PathLike or None, got 3"),
    (lambda: trainer(scheduler=3), "scheduler expected a function or None, got 3"),
    (lambda: trainer(schedule="layerwise"), "schedule expected a Schedule or None"),
    (lambda: trainer(plan="small"), "plan expected a Plan or None, got 'small'"),
    (lambda: trainer(memory="440MB"), "memory expected a Memory, got '440MB'"),
    (lambda: trainer().fit(3), "train_loader expected something to iterate over, got 3"),
    (lambda: trainer().fit(None), "train_loader expected something to iterate over, got None"),
    (lambda: trainer().fit([]), "expected a loader with at least one batch, got none"),
    (lambda: trainer().fit([], until="x"), "until expected a whole number or None, got 'x'"),
    (lambda: trainer().fit([], callbacks=3), "callbacks expected a list of Callback objects"),
    (lambda: trainer().fit((torch.rand(4, 4),)), "expected a batch of samples and labels, got Ten"),
    (lambda: trainer(batch_size=4).evaluate(3), "a loader expected something to iterate over"),
    (lambda: trainer().resume(None), "run expected a word or a PathLike, got None"),
    (lambda: trainer().resume("nowhere"), "expected a run folder with latest.safetensors"),
    (lambda: trainer().save(), "expected a path, or a trainer with a run folder"),
    (lambda: trainer().step(3), "expected a batch of samples and labels, got int"),
    (lambda: trainer().step(torch.rand(2, 4), torch.arange(2), epoch="x"), "expected a whole"),
    (lambda: trainer().step(torch.rand(2, 4), torch.arange(2), epoch=-1), "0 or more, got -1"),
    (lambda: data.loader(3, batch_size=4), "image_set expected an ImageSet, got 3"),
    (lambda: data.loader(images(), batch_size=0), "batch_size"),
    (lambda: data.loader(images(), batch_size=4, seed="x"), "seed expected a whole number"),
    (lambda: data.load(None), "name expected a word, got None"),
    (lambda: data.load("digts"), "did you mean digits?"),
    (lambda: data.load("digits", seed="x"), "seed expected a whole number, got 'x'"),
    (lambda: data.augment.by_name(3), "text expected a word, got 3"),
    (lambda: ff.models.create(3), "unknown model 3"),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_bad_arguments_are_one_line(number: int) -> None:
    call, said = CASES[number]
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    text = str(caught.value)
    assert text.startswith("[") and "\n" not in text and said in text, text


def test_what_fits_is_taken_as_it_is() -> None:
    """Whole numbers for numbers, lists for tuples, a ModuleList for a list of layers, NumPy's
    numbers."""
    import numpy as np

    made = net(torch.nn.ModuleList([layer()]), in_shape=[4], num_classes=np.int64(2))
    assert made(torch.rand(3, 4)).shape == (3, 2)
    assert ff.Trainer(made, lr=1, progress=False).settings.lr == 1
    assert Interleaved([(0, 1), [1, 2]]).spans == ((0, 1), (1, 2))
