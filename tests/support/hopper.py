"""Triton kernels compiled for a Hopper GPU, which need not be there: the resources that they take."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Resources:
    """What one thread of a compiled kernel takes, and how it reaches memory."""

    registers: int
    spilled_bytes: int
    """Bytes of registers spilled to local memory."""
    stack_bytes: int
    """Local memory."""
    wide_loads: int
    """Load instructions of 128 bits."""
    wide_stores: int
    """Store instructions of 128 bits."""


def compile_for_hopper(kernel: Any, signature: dict[str, str], **sizes: int) -> Resources:
    """Compile for sm_90, with four warps per program.

    `signature` has the types of the arguments, `sizes` the constants. Pointers, and numbers whose type ends
    in ":16", are multiples of 16, as Triton would find out at run time.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, kind in enumerate(signature.values())
        if kind.startswith("*") or kind.endswith(":16")
    }
    types = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    types |= dict.fromkeys(sizes, "constexpr")
    source = ASTSource(fn=kernel, signature=types, constexprs=sizes, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as name:
        ptx, cubin = Path(name, "kernel.ptx"), Path(name, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        assemble = [tools / "ptxas", "-v", "-arch=sm_90a", ptx, "-o", Path(name, "unused")]
        log = subprocess.run(assemble, capture_output=True, text=True, check=True).stderr
        listing = subprocess.run([tools / "nvdisasm", cubin], capture_output=True, text=True, check=True)
    stack, stored, loaded = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log))
    return Resources(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),  # type: ignore[index]
        spilled_bytes=stored + loaded,
        stack_bytes=stack,
        wide_loads=len(re.findall(r"LDG\.E\.\S*128", listing.stdout)),
        wide_stores=len(re.findall(r"STG\.E\.\S*128", listing.stdout)),
    )
