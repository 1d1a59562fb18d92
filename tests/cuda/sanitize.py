"""Small calls of our kernels for compute-sanitizer, which slows them a hundredfold.

    compute-sanitizer --tool memcheck python tests/cuda/sanitize.py --plant

Every op by every back-end in turn, each call held to the fp64 reference; it ends by itself when its
time is over, so that the tool's summary is printed, and says how far it came. --plant: the last
call reads past its end; a tool that does not see that has not looked at the others either.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

from local_pass_cuda_cases import CASES, CLUSTER_CASES, check  # noqa: E402

from ffengine.ops.local_pass import local_pass  # noqa: E402
from ffengine.ops.optimizer_step import optimizer_step  # noqa: E402
from tests import batch_pass_cases, compressed_step_cases, linear_step_cases  # noqa: E402

Calls = list[tuple[str, Callable[[], Any]]]


def sweeps(backend: str, device: str, small: bool) -> Calls:
    """local_pass: those that one read is enough for, and the others, by turns."""
    def run(*args: Any, **kwargs: Any) -> Any:
        return local_pass(*args, **kwargs, backend=backend)

    pairs = zip_longest([] if small else CLUSTER_CASES, CASES[::4] if small else CASES)
    chosen = [case for pair in pairs for case in pair if case is not None]
    return [(f"local_pass {case.id} {layout}", partial(
        check, case, case.dtypes[-1], layout, device, run))
        for case in chosen for layout in case.layouts[::-1]]


def calls(backend: str, device: str, small: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every op's calls, the ops by turns. small: for kernels that are interpreted."""
    def compressed(name: str, case: Any) -> None:
        compressed_step_cases.check(
            name, case, lambda *given: optimizer_step(*given, backend), device)

    ops: tuple[Calls, ...] = (
        sweeps(backend, device, small),
        [(f"batch_pass {name}", partial(case.check, backend, device))
         for name, case in batch_pass_cases.cases().items()],
        [(f"linear_step {name}", partial(linear_step_cases.check, *case, backend, device))
         for name, case in linear_step_cases.INTERPRETED.items()],
        [(f"optimizer {name}", partial(compressed, name, case))
         for name, case in compressed_step_cases.CASES.items()])
    for turn in zip_longest(*ops):
        yield from (call for call in turn if call is not None)


def plant(device: str) -> None:
    """Read four bytes past an allocation of four; the processor's memory is left alone."""
    if device != "cuda":
        return
    from planted import planted_kernel

    four = torch.zeros(1, device=device)
    planted_kernel[(1,)](four, torch.empty(1, device=device))
    with contextlib.suppress(RuntimeError):  # the tool ends the context with the error
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="cuda,triton")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--until", type=float, default=float("inf"),
                        help="time of the monotonic clock to end at, whenever the tool began")
    parser.add_argument("--calls", type=int, help="of all, only so many, spread over them")
    parser.add_argument("--plant", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    small = args.device == "cpu"
    turns = zip_longest(*(calls(b, args.device, small) for b in args.backends.split(",")))
    everything = [(f"{call[0]}, {backend}", call[1]) for turn in turns
                  for backend, call in zip(args.backends.split(","), turn, strict=True) if call]
    everything = everything[::max(1, len(everything) // args.calls)] if args.calls else everything
    done, wrong = 0, 0
    for name, call in everything:
        if time.monotonic() > args.until:
            break
        print(f"case {name}", flush=True)
        try:
            call()
            if args.device == "cuda":
                torch.cuda.synchronize()
        except Exception as reason:  # the tool is asked about the others all the same
            wrong += 1
            print(f"WRONG {name}: {type(reason).__name__}: {' '.join(str(reason).split())[:300]}",
                  flush=True)
        done += 1
    print(f"{done - wrong} of {len(everything)} calls right, {wrong} wrong, "
          f"{len(everything) - done} not reached", flush=True)
    if args.plant:
        print("case planted", flush=True)
        plant(args.device)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
