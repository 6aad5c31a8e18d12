"""Compiles the kernels for GPUs that need not be there, and prints what became of them, as JSON.

Run as a program, with TRITON_INTERPRET=0: in a process that interprets kernels none is compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusebn.triton import _verbs
from fusebn.triton._backward import backward_kernel, backward_sums_kernel
from fusebn.triton._moments import moments_kernel
from fusebn.triton._normalize import normalize_kernel
from fusebn.triton._plan import WARPS, plan, residency
from fusebn.triton._resident_backward import gradient_kernel
from fusebn.triton._resident_forward import forward_kernel

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
PROCESSORS = 132
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
_VECTORS = {"FINISHED": "i32", "PARTIALS": "fp64", "COUNT": "fp64", "BATCH": "fp64", "SUMS": "fp64"}
_TENSORS = {"X", "Y", "DY", "DX", "RESIDUAL", "DRESIDUAL", "G"}
_PARAMETERS = {"COUNT", "BATCH", "SCALE", "OFFSET"}
# Kernel -> whether it joins, how many arrays it reads, and what it is called with.
KERNELS = {
    moments_kernel: (True, 1, {"X", "PARTIALS", "FINISHED", "COUNT", "BATCH", "MEAN", "VARIANCE",
                               "MEAN_OUT", "VARIANCE_OUT"}),
    normalize_kernel: (False, 1, {"X", "Y", *_PARAMETERS}),
    backward_sums_kernel: (True, 2, {"DY", "X", "PARTIALS", "FINISHED", "SUMS", "DSCALE",
                                     "DOFFSET", *_PARAMETERS}),
    backward_kernel: (False, 2, {"DY", "X", "DX", "SUMS", *_PARAMETERS}),
}  # fmt: skip


def compiled(kernel, block, element, capability, residual=False):
    joins, reads, given = KERNELS[kernel]
    if residual:
        reads, given = reads + 1, given | {"RESIDUAL"}
    view = plan(*block, SIZES[element], PROCESSORS, joins=joins)
    stat = "fp64" if element == "fp64" else "fp32"
    walk = dict(zip(_verbs.WALK, _verbs._walk(view), strict=True))
    constants = {
        **_verbs._shape(view, tl.float64 if stat == "fp64" else tl.float32),
        "EPSILON": 1e-3, "TRAINING": True, "ACTIVATION": "relu", "CORRECTION": 1.0, "MIXED": True,
        "JOINED": _verbs._joined(view), "AHEAD": _verbs._ahead(*range(reads)),
    }  # fmt: skip
    signature, fixed, attributes = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or (name.isupper() and name not in given):
            signature[name], fixed[name] = "constexpr", constants.get(name)
            continue
        if name.isupper():
            signature[name] = "*" + (element if name in _TENSORS else _VECTORS.get(name, stat))
        else:
            signature[name] = "i32" if name in walk else "fp32"
        if name.isupper() or walk.get(name, 1) % 16 == 0:  # as Triton finds them when called
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": WARPS})


# What a kernel that holds the batch is called with, besides words.
RESIDENT = {
    forward_kernel: (1, {"X", "Y", "PARTIALS", "ARRIVED", "MEAN", "VARIANCE", "MEAN_OUT",
                         "VARIANCE_OUT", *_PARAMETERS}),
    gradient_kernel: (2, {"DY", "X", "DX", "PARTIALS", "ARRIVED", "DSCALE", "DOFFSET",
                          *_PARAMETERS}),
}  # fmt: skip


def resident(kernel, element, capability):
    """Compile for the most that is held."""
    arrays, given = RESIDENT[kernel]
    held = residency(32 * 132 * 32 // arrays, 64, 1, SIZES[element], PROCESSORS, arrays)
    constants = {
        "ROWS": held.rows, "WORDS": held.words, "HELD": held.held,
        "ELEMENT": {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[element],
        "EPSILON": 1e-3, "ACTIVATION": "relu", "CORRECTION": 1.0, "MIXED": True,
    }  # fmt: skip
    signature, fixed, attributes = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or (name.isupper() and name not in given):
            signature[name], fixed[name] = "constexpr", constants.get(name)
            continue
        if name in _TENSORS or name == "ARRIVED":
            signature[name] = "*i32"
        elif name == "PARTIALS":
            signature[name] = "*fp32" if kernel is forward_kernel else "*fp64"
        elif name.isupper():
            signature[name] = "*" + _VECTORS.get(name, "fp32")
        else:
            signature[name] = "fp32" if name.startswith("factor") else "i32"
        if name.isupper() or name == "words":
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, attributes)
    options = {"num_warps": WARPS, "launch_cooperative_grid": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def described(binary):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        usage, code = (
            subprocess.run([TOOL, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack, _, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage).groups()
    )
    instructions = Counter(re.findall(r"\b((?:LDG|STG|LDL|STL|ATOMG?)\.[A-Z0-9.]+)", code))
    ptx = binary.asm["ptx"]
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": binary.metadata.shared,
        "instructions": dict(instructions),
        "acquires": "acquire" in ptx or "acq_rel" in ptx,
        "releases": "release" in ptx or "acq_rel" in ptx,
    }


def main(capability):
    resnet, odd, first = (100352, 256, 1), (100352, 100, 1), (32, 64, 12544)
    cases = [(kernel, resnet, "bf16", False) for kernel in KERNELS]
    if capability == 90:
        cases += [(kernel, first, "bf16", False) for kernel in KERNELS]
        cases += [(kernel, odd, "bf16", False) for kernel in KERNELS]
        cases += [(kernel, resnet, "fp32", False) for kernel in KERNELS]
        cases += [(kernel, resnet, "fp16", True) for kernel in KERNELS if kernel is not
                  moments_kernel]  # fmt: skip
    for kernel, block, element, residual in cases:
        found = described(compiled(kernel, block, element, capability, residual))
        name = kernel.__name__.removesuffix("_kernel")
        print(json.dumps({"kernel": name, "block": block, "element": element, **found}))
    for kernel in RESIDENT:
        for element in ("bf16", "fp32") if capability == 90 else ():
            found = described(resident(kernel, element, capability))
            name = f"resident_{kernel.__name__.removesuffix('_kernel')}"
            print(json.dumps({"kernel": name, "element": element, **found}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
