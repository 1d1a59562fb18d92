"""The processes of a run: torch.distributed's group of them, and the store that they share.

torchrun starts them, or `launch.local` does on one machine; either way RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT say who is who.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from ffengine.version import __version__

#: torch.distributed.Store, which type checkers are not shown.
Store = Any
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Of single operations of the group: the watch (watch.py) ends a run long before.
FOREVER = timedelta(days=30)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


#: Seconds that ranks which find something wrong wait for others that find it too.
TOGETHER = 5.0


class RankLost(RuntimeError):
    """Another rank is there no more."""


class Ranks:
    """This process among the others.

    Args:
        rank, size: which one of how many.
        connect: makes a client of the store that all of them see.
    """

    def __init__(self, rank: int, size: int, connect: Callable[[], Store]) -> None:
        self.rank, self.size, self.connect = rank, size, connect
        #: Two groups of all ranks, for links in turn: a rank's two links do not share one.
        self.groups = [dist.new_group(timeout=FOREVER) for _ in range(2)]

    def collect(self, value: Any) -> list[Any] | None:
        """Every rank's value, in order, on rank 0; None elsewhere. Tensors lie on the CPU."""
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self._all_there():
            dist.gather_object(value, found)
        return found

    def tell(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        found = [value]
        with self._all_there():
            dist.broadcast_object_list(found)
        return found[0]

    def everyone(self) -> None:
        """Wait until all ranks are here."""
        with self._all_there():
            dist.barrier()

    def abort(self) -> None:
        """Close all connections, so that threads end which wait in vain: gloo does so where any
        operation has waited for too long."""
        other = (self.rank + 1) % self.size
        for group in (*self.groups, None):
            with contextlib.suppress(RuntimeError, ValueError):  # ValueError: it is alone
                work = dist.irecv(torch.empty(1), other, group, tag=1)
                if work is not None:
                    work.wait(timedelta(milliseconds=1))

    @contextlib.contextmanager
    def _all_there(self) -> Iterator[None]:
        """RankLost, naming what a rank has found wrong, where a connection closes."""
        try:
            yield
        except RuntimeError as error:
            closed = "Connection closed" in str(error)  # in gloo's words, with much beside
            why = "its connection closed" if closed else str(error).splitlines()[0]
            wrong = f"[pipeline] lost another rank: {why}"
            with contextlib.suppress(RuntimeError):
                store = self.connect()
                for rank in range(self.size):
                    if store.check([f"wrong/{rank}"]):
                        wrong = f"[pipeline] rank {rank}: {store.get(f'wrong/{rank}').decode()}"
            raise RankLost(wrong) from None

    def spoken(self, error: Exception) -> None:
        """Mark an error (`said`) that rank 0 has, too: of what all find wrong, one speaks."""
        with contextlib.suppress(RuntimeError):
            store, text = self.connect(), str(error)
            store.set(f"wrong/{self.rank}", text)
            wanted = [f"wrong/{rank}" for rank in (range(self.size) if self.rank == 0 else [0])]
            end = time.monotonic() + TOGETHER
            while time.monotonic() < end and not store.check(wanted):
                time.sleep(0.1)
            if self.rank > 0 and store.check(wanted):
                error.said = store.get("wrong/0").decode() == text  # type: ignore[attr-defined]

    def agree(self, said: Mapping[str, str]) -> None:
        """Compare what every rank says of its code and of what it is to do.

        Raises:
            ValueError: on every rank, naming the first that differs from rank 0.
        """
        found, wrong = self.collect(dict(said)), None
        for rank, other in enumerate(found or ()):
            differs = [name for name, mine in said.items() if other.get(name) != mine]
            if differs and wrong is None:
                wrong = (f"[pipeline] expected the same {differs[0]} on every rank, got another "
                         f"on rank {rank}: {other.get(differs[0])} instead of {said[differs[0]]}")
        self.refuse(wrong)

    def refuse(self, wrong: str | None) -> None:
        """ValueError on every rank if rank 0 has something against going on; rank 0 says it."""
        found = self.tell(wrong)
        if found is not None:
            error = ValueError(found)
            error.said = self.rank != 0  # type: ignore[attr-defined]
            raise error


#: This process among those that it has met.
_met: Ranks | None = None


def environment(stages: int) -> Mapping[str, str]:
    """The rendezvous, as the starter of the processes has told this one.

    Raises:
        ValueError: nobody has, or of another number of processes.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(f"[pipeline] expected a rendezvous, as torchrun --nproc-per-node {stages} "
                         f"gives, got no {', '.join(missing)}")
    if os.environ["WORLD_SIZE"] != str(stages):
        raise ValueError(f"[pipeline] expected {stages} processes, one a stage, got WORLD_SIZE="
                         f"{os.environ['WORLD_SIZE']}")
    return os.environ


def join(stages: int, device: torch.device, timeout: float) -> Ranks:
    """Meet the other processes.

    Raises:
        ValueError: no rendezvous, or one of another size; the others do not come in time.
    """
    global _met
    env = environment(stages)
    if _met is not None:
        return _met
    rank, host, port = int(env["RANK"]), env["MASTER_ADDR"], int(env["MASTER_PORT"])
    if host in LOOPBACK:
        names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0] if names else "")
    wait = timedelta(seconds=timeout)
    try:
        # torchrun's agent keeps the store, and keeps it when it starts the ranks again
        keeps = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not keeps:
            reach(host, port, timeout)
        store = TCPStore(host, port, stages, is_master=keeps, timeout=wait, wait_for_workers=False)
        start = f"start {env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        mine = PrefixStore(start, store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        meet(mine, rank, stages, timeout)
        dist.init_process_group(backend, store=mine, rank=rank, world_size=stages,
                                timeout=FOREVER)
    except (OSError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"[pipeline] expected {stages} ranks to meet at {host}:{port} within "
                         f"{timeout:g} s, got {why}") from None

    def connect() -> Store:
        return PrefixStore(start, TCPStore(
            host, port, is_master=False, timeout=wait, wait_for_workers=False))

    _met = Ranks(rank, stages, connect)
    return _met


def reach(host: str, port: int, timeout: float) -> None:
    """Wait until somebody listens there; OSError if nobody does in time. torch's own client fills
    a page where nobody does."""
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=timeout).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def meet(store: Store, rank: int, size: int, timeout: float) -> None:
    """Wait until all ranks have come to the store; OSError naming those that do not."""
    store.set(f"came/{rank}", "")
    end, away = time.monotonic() + timeout, list(range(size))
    while away := [r for r in away if not store.check([f"came/{r}"])]:
        if time.monotonic() > end:
            raise OSError(f"no rank {', '.join(map(str, away))}")
        time.sleep(0.05)


def leave() -> None:
    """End the group of processes, if this one is in it."""
    global _met
    if _met is not None:
        _met.groups.clear()  # their threads end before the interpreter does
        dist.destroy_process_group()
        _met = None


def spoken(error: Exception) -> None:
    """As Ranks.spoken, if this process has met any."""
    if _met is not None and not hasattr(error, "said"):
        _met.spoken(error)


def digest(net: torch.nn.Module, **said: Any) -> dict[str, str]:
    """What has to be the same on every rank: the code, the weights, and whatever else is said."""
    code, weights = hashlib.sha256(), hashlib.sha256()
    for path in sorted(Path(__file__).parents[2].rglob("*.py")):
        code.update(path.read_bytes())
    for name, t in net.state_dict().items():
        weights.update(name.encode())
        weights.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {"ffengine": f"{__version__} ({code.hexdigest()[:12]})", "torch": torch.__version__,
            **{name: json.dumps(value, default=str, sort_keys=True)
               for name, value in said.items()},
            "weights": weights.hexdigest()[:12]}
