"""Compiles the benchmark's probes for a GPU that need not be there, as `compiled.py` does ours."""

import json

import triton
from compiled import described
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusebn.cli.bench.device import probes

KERNELS = (
    probes.copy_kernel,
    probes.read_kernel,
    probes.write_kernel,
    probes.empty_kernel,
    probes.barrier_kernel,
)


def compiled(kernel):
    signature, fixed, attributes = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], fixed[name] = "constexpr", probes.WORDS
            continue
        signature[name] = "*i32" if name.isupper() else "i32"
        if name.isupper() or name == "size":
            attributes[(at,)] = [["tt.divisibility", 16]]
    options = {"num_warps": probes.WARPS}
    source = ASTSource(kernel, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def main():
    for kernel in KERNELS:
        name = kernel.__name__.removesuffix("_kernel")
        print(json.dumps({"kernel": name, **described(compiled(kernel))}))


if __name__ == "__main__":
    main()
