"""What the compiler made of each GPU kernel, read from its machine code; no GPU needed.

Of every kernel in a cubin, or in a module that nvcc linked: registers a thread, spilled bytes,
static shared memory, and how many of its loads from and stores to global memory there are and how
many of them move 16 bytes at once. The same kernel under two compilers is two kernels: `compiler`
says which one it was.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

Counters = dict[str, int]

#: The anonymous namespace of a .cu file: its name is the file's, beside hashes of path and content.
_FILE = re.compile(r"\d+_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]{8}")
_USAGE = re.compile(r"(REG|STACK|LOCAL|SHARED):(\d+)")
_SASS = re.compile(r"\b(LDG|LDGSTS|STG)((?:\.\w+)*)\s")
_PTX = re.compile(r"\b(ld|st)\.global[\w.:]*")


def tool() -> str | None:
    """cuobjdump: the one Triton ships, else one on the path."""
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        shipped = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        if shipped.exists():
            return str(shipped)
    return shutil.which("cuobjdump")


def compiler(binary: Path) -> str | None:
    """"V13.0.88" of the CUDA compiler whose code a binary holds; None where it holds none."""
    found = re.search(rb"Cuda compilation tools, release [\d.]+, (V[\d.]+)", binary.read_bytes())
    return None if found is None else found[1].decode()


def kernels(binary: Path, arch: str = "") -> dict[str, Counters]:
    """All counters of a binary's kernels by "ARCH KERNEL"; `arch` is that of a bare cubin."""
    accesses: dict[str, list[tuple[str, bool]]] = {}
    for name, counter, wide in _memory(binary):
        accesses.setdefault(name, []).append((counter, wide))
    return {name: {**usage, **counted(accesses.get(name, []))}
            for name, usage in usages(binary, arch)}


def counted(accesses: list[tuple[str, bool]]) -> Counters:
    """How many of ("loads" or "stores", 16 bytes at once) there are, and how many of them wide."""
    found = {f"{counter}{suffix}": 0 for counter in ("loads", "stores") for suffix in ("", "_16")}
    for counter, wide in accesses:
        found[counter] += 1
        found[f"{counter}_16"] += wide
    return found


def ptx_accesses(ptx: str) -> list[tuple[str, bool]]:
    """Accesses to global memory in PTX, which ptxas keeps one for one: 16 bytes are v4.b32 or
    v2.b64. Disassembling each cubin would take as long again as compiling it.
    """
    return [("loads" if found[1] == "ld" else "stores", found[0].endswith((".v4.b32", ".v2.b64")))
            for found in _PTX.finditer(ptx)]


def usages(binary: Path, arch: str = "") -> Iterator[tuple[str, Counters]]:
    """("ARCH KERNEL", registers, shared and spills) of each kernel."""
    name = ""
    for line in _dump(binary, "--dump-resource-usage"):
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif line.startswith(" Function "):
            name = f"{arch} {plain(line.removeprefix(' Function ').rstrip(':'))}"
        elif fields := dict(_USAGE.findall(line)):
            yield name, {"registers": int(fields["REG"]), "shared": int(fields["SHARED"]),
                         "spills": int(fields["STACK"]) + int(fields["LOCAL"])}


def _memory(binary: Path) -> Iterator[tuple[str, str, bool]]:
    """(kernel, "loads" or "stores", 16 bytes at once) of each access to global memory."""
    arch = name = ""
    for line in _dump(binary, "-sass"):
        if "code for sm_" in line:
            arch = line.split()[-1]
        elif "Function : " in line:
            name = f"{arch} {plain(line.split(' : ')[1])}"
        elif found := _SASS.search(line):
            yield name, "stores" if found[1] == "STG" else "loads", "128" in found[2].split(".")


def plain(symbol: str) -> str:
    """A kernel's symbol without the hashes that move with the folder it was built in."""
    return _FILE.sub(r"\1.", symbol.strip())


def _dump(binary: Path, what: str) -> list[str]:
    found = tool()
    if found is None:
        raise ValueError("[machine code] expected cuobjdump, of Triton or the CUDA toolkit, got "
                         "none")
    done = subprocess.run([found, what, str(binary)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"[machine code] cuobjdump {what} {binary}: {done.stderr.strip()[-200:]}")
    return done.stdout.splitlines()
