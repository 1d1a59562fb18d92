"""Checkpoints: one safetensors file each, its JSON in the file's own header.

Weights, optimizer states and what describes the run travel in one file that is replaced in one
act, so no mixture of two checkpoints can exist. A digest of the tensors stands in the header;
a file that does not match it is refused before anything is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ffengine.engine.optim import outline, round_weights
from ffengine.engine.run import header as form
from ffengine.engine.run.stopping import not_finite
from ffengine.needs import need
from ffengine.nn.heads import LinearHead
from ffengine.nn.network import LocalNet
from ffengine.ops.config import Loss

FORMAT = 1
LATEST, BEST = "latest.safetensors", "best.safetensors"
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16",
          torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}


@dataclass
class Checkpoint:
    """What a file holds: `meta` is its JSON, `tensors` are by name."""

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors under `prefix.`, by the rest of their names."""
        start = f"{prefix}."
        return {k.removeprefix(start): t for k, t in self.tensors.items() if k.startswith(start)}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes `path`'s place when the block ends well, and is on disk by then.

    Raises:
        OSError: one line with the path, of a full disk say; what stood there stands, and no folder
            that was made for it is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb+") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()
        if isinstance(error, OSError):
            raise OSError(f"[files] expected to write {path}, got: "
                          f"{error.strerror or error}") from error
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut; not every system lets one."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """The whole of `data` as the file `path`, or no change; see `replacing`."""
    with replacing(path) as file:
        file.write(data)


def save(path: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Write a checkpoint; one tensor at a time is copied to the host."""
    empty = hashlib.sha256().hexdigest()
    header: dict[str, Any] = {
        "__metadata__": {"sha256": empty, "json": json.dumps({"format": FORMAT, **meta})}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(text)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(raw.data)
            file.write(raw.data)
        # same length as the placeholder, so only these bytes change
        file.seek(8 + text.index(empty.encode()))
        file.write(digest.hexdigest().encode())


def copy(path: Path, to: Path) -> None:
    """`to` becomes the same checkpoint: a second name of the file, or a copy where links fail."""
    temporary = to.with_name(f".{to.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        with path.open("rb") as source, replacing(to) as file:
            shutil.copyfileobj(source, file)
        return
    os.replace(temporary, to)
    sync_folder(to.parent)


def locate(run: str | os.PathLike[str], name: str = LATEST) -> Path:
    """The checkpoint file of a run folder; a file is taken as it is."""
    path = Path(run)
    found = path / name if path.is_dir() else path
    if not found.is_file():
        raise ValueError(f"[checkpoint] expected a run folder with {name} or a checkpoint file, "
                         f"got {run}")
    return found


def load(run: str | os.PathLike[str], name: str = LATEST) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        ValueError: no checkpoint, not one of ours, truncated, damaged, or with numbers that are not
            finite.
        ImportError: no safetensors to read it with.
    """
    path = locate(run, name)
    reader = need("safetensors", "[checkpoint] reading a checkpoint")
    try:
        with reader.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if "json" not in header or "sha256" not in header:
                raise ValueError(f"[checkpoint] expected a checkpoint of ffengine, got {path}")
            if file_digest(path, header["sha256"]) != header["sha256"]:
                raise ValueError(f"[checkpoint] {path} is damaged: it does not match its digest")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (reader.SafetensorError, OSError) as error:
        raise ValueError(f"[checkpoint] {path} is truncated or damaged: {error}") from None
    try:
        meta = json.loads(header["json"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"[checkpoint] {path} is damaged: its JSON is none ({error})") from None
    known = meta.get("format") if isinstance(meta, dict) else None
    if known != FORMAT:
        raise ValueError(f"[checkpoint] expected format {FORMAT}, got {known} in {path}")
    if (bad := not_finite(tensors)) is not None:
        raise ValueError(f"[checkpoint] expected finite numbers, got NaN or infinity in {bad} of "
                         f"{path}")
    return Checkpoint(path, meta, tensors)


def load_run(run: str | os.PathLike[str], name: str = LATEST) -> Checkpoint:
    """`load`, and ValueError unless it holds all that a run's has: see header.py."""
    found = load(run, name)
    form.check(found.meta, found.tensors, found.path)
    return found


def file_digest(path: Path, claimed: str) -> str:
    """sha256 of header and tensors, the digest's own place in the header as when it was taken."""
    empty = hashlib.sha256().hexdigest()
    with path.open("rb") as file:
        text = file.read(struct.unpack("<Q", file.read(8))[0])
        digest = hashlib.sha256(text.replace(claimed.encode(), empty.encode(), 1))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def architecture(net: LocalNet) -> dict[str, Any]:
    """A network in plain values, to tell two apart by name of what differs."""
    rows: dict[str, Any] = {"model": net.origin[0] if net.origin else None,
                            "classes": net.num_classes, "input": list(net.in_shape),
                            "input_norm": str(net.input_norm), "layers": len(net.layers),
                            "encoding": type(net.encoding).__name__,
                            "negatives": net.negatives, "propagate": net.propagate,
                            "readout": str(net.readout),
                            "heads": [f"{h.layers} {h.image} {h.features} {h.loss}"
                                      for h in net.heads if isinstance(h, LinearHead)]}
    for i, wire in enumerate(net.wires):
        layer = net.layer(i)
        config, geometry = layer.config, layer.geometry
        loss = config.loss
        rows[f"layer {i}"] = [
            f"weight {'x'.join(map(str, layer.weight.shape))}",
            f"bias {layer.bias is not None}", f"groups {config.groups}",
            f"stride {geometry.stride} padding {geometry.padding}" if geometry else "linear",
            f"goodness {config.goodness}", f"pool {config.pool}", f"relu {config.relu_gradient}",
            f"norm {config.norm}", f"dropout {layer.dropout}", f"blend {config.blend}",
            str(loss) if isinstance(loss, Loss) else f"loss {function_name(loss)}", str(wire),
            f"input {layer.pre_norm.kind if layer.pre_norm else 'as it is'}",
            str(layer.batch_coupling)]
    return rows


def structure(net: LocalNet) -> dict[str, Any]:
    """Units of every layer and the offsets of their groups: what edits change (adapt.edits)."""
    layers = [net.layer(i) for i in range(len(net.layers))]
    return {"units": [layer.units for layer in layers],
            "groups": [list(layer.config.offsets(layer.units)) for layer in layers]}


def function_name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def check_architecture(found: Checkpoint, net: LocalNet) -> None:
    """ValueError naming the first thing in which the checkpoint's network differs from `net`."""
    mine, theirs = architecture(net), found.meta["architecture"]
    for key, value in mine.items():
        saved = theirs.get(key)
        if value == saved:
            continue
        if isinstance(value, list) and isinstance(saved, list) and len(value) == len(saved):
            value, saved = next((a, b) for a, b in zip(value, saved, strict=True) if a != b)
        raise ValueError(f"[checkpoint] expected {key} of {value}, got {saved} in {found.path}")


def check_tensors(found: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    """ValueError unless the checkpoint holds these tensors, of these shapes and dtypes."""
    for name in [*expected, *(k for k in found.tensors if k not in expected)]:
        want, have = expected.get(name), found.tensors.get(name)
        if want is None or have is None or want.shape != have.shape or want.dtype != have.dtype:
            raise ValueError(f"[checkpoint] expected {shown(want)} for {name}, got {shown(have)} "
                             f"in {found.path}")


def shown(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "no tensor"
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def check_range(found: Checkpoint, net: LocalNet) -> None:
    """ValueError unless the checkpoint's layer range is one of this network, which takes it."""
    saved = found.part("net").get("_extra_state")
    try:
        if saved is not None:
            net.set_extra_state(saved)
    except ValueError as error:
        raise ValueError(f"[checkpoint] {error} in {found.path}") from None


def load_network(found: Checkpoint, net: LocalNet) -> None:
    """Weights and layer range into `net`, once everything fits; else nothing changes."""
    form.check(found.meta, found.tensors, found.path)
    rounded = found.meta["settings"].get("weights") == "bf16"
    check_architecture(found, net)
    seen = outline(net)
    if rounded:
        round_weights(seen)
    check_tensors(Checkpoint(found.path, found.meta, found.part("net")), seen.state_dict())
    check_range(found, seen)
    if rounded:
        round_weights(net)
    net.load_state_dict(found.part("net"))
