"""The house rules that a machine can keep: who imports whom, what is public, which words."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import fusebn
from fusebn import _numpy

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "fusebn"
KERNELS = ROOT / "csrc"

# Module -> the modules of fusebn it may import. Arrows point down only; see ARCHITECTURE.md.
ARROWS = {
    "__init__": {
        "_core",
        "_spec",
        "_dispatch",
        "_folding",
        "_info",
        "memory",
        "quantize",
        "_layer",
        "_moments",
        "_results",
        "_store",
    },
    "__main__": {"cli"},
    "_folding": {"_dispatch", "_spec"},
    "_store": {"_layer", "_spec"},
    "_layer": {"_moving", "_numpy", "_results", "_spec", "_transforms", "quantize"},
    "_moments": {"_numpy", "_spec"},
    "_numpy": {"_blocks", "_core", "_moving", "_quantization", "_results", "_spec", "memory"},
    "quantize": {"_dispatch", "_quantization", "_spec", "_transforms"},
    "_transforms": {"_quantization", "_spec"},
    "_quantization": {"_spec"},
    "_dispatch": {"_spec"},
    "_moving": {"_spec"},
    "_info": {"_core"},
    "_blocks": {"memory"},
    "memory": {"_core", "_spec"},
    "_report": set(),
    "_results": set(),
    "_spec": set(),
    "_reference": set(),
}
# The same for adapters that are folders: of their own modules, and of fusebn's.
ADAPTER_ARROWS = {
    "tensorflow": {
        "__init__": {"_ops", "_quantize", "_spec", "layers", "moving_averages", "nn"},
        "_quantize": {
            "_arguments",
            "_array_ops",
            "_autograph",
            "_functions",
            "_quantization",
            "_spec",
            "_transforms",
        },
        "_transformed": {"_array_ops", "_quantize", "_transforms"},
        "_array_ops": {"_ops", "_quantization"},
        "layers": {
            "_transformed",
            "_transforms",
            "_arguments",
            "_autograph",
            "_batch_norm",
            "_functions",
            "_ops",
            "_renorm",
            "_spec",
            "_variables",
        },
        "nn": {"_autograph", "_functions", "_results", "_spec"},
        "_arguments": {"_functions", "_spec"},
        "_batch_norm": {
            "_functions",
            "_groups",
            "_portable",
            "_renorm",
            "_transformed",
            "moving_averages",
        },
        "_functions": {
            "_array_ops",
            "_autograph",
            "_ops",
            "_portable",
            "_results",
            "_spec",
            "moving_averages",
        },
        "_renorm": {"_variables", "moving_averages"},
        "moving_averages": {"_autograph", "_spec", "_variables"},
        "_ops": {"_core", "_portable"},
        "_portable": set(),
        "_groups": set(),
        "_variables": {"_spec"},
        "_autograph": set(),
    },
    "torch": {
        "__init__": {
            "_explain",
            "_fold",
            "_functions",
            "_fuse",
            "_spec",
            "functional",
            "modules",
            "qat",
            "quantize",
            "sync",
        },
        "sync": {
            "_arguments",
            "_batch_statistics",
            "_merging",
            "_portable",
            "_spec",
            "_synchronized",
            "_variables",
            "modules",
        },
        "_synchronized": {"_gpu", "_merging", "_portable", "_verbs"},
        "modules": {"_calls", "_spec", "_transforms", "_variables", "_wide", "functional"},
        "quantize": {
            "_arguments",
            "_array_ops",
            "_calls",
            "_quantization",
            "_spec",
            "_transforms",
            "_wide",
        },
        "_array_ops": {"_arguments", "_ops", "_quantization"},
        "_calls": {"_spec"},
        "_wide": set(),
        "_variables": {"_array_ops", "_quantization", "_transforms"},
        "functional": {
            "_arguments",
            "_batch_statistics",
            "_ops",
            "_portable",
            "_spec",
            "_variables",
        },
        "_batch_statistics": {
            "_arguments",
            "_kernels",
            "_library",
            "_merging",
            "_ops",
            "_portable",
            "_variables",
            "_verbs",
        },
        "_merging": {"_portable"},
        "_ops": {"_arguments", "_gpu", "_kernels", "_library", "_native", "_portable"},
        "_library": {"_arguments", "_gpu", "_kernels", "_portable", "_transforms", "_verbs"},
        "_gpu": {"_arguments", "_kernels", "_portable", "_spec", "triton"},
        "_transforms": set(),
        "_verbs": {"_arguments", "_core", "_kernels", "_portable"},
        "_kernels": {"_arguments", "_core", "_portable", "_spec"},
        "_functions": {
            "_arguments",
            "_array_ops",
            "_moving",
            "_ops",
            "_portable",
            "_results",
            "_spec",
        },
        "_explain": {"_folding", "_planning", "_report", "modules"},
        "_fuse": {"_planning"},
        "_fold": {
            "_calls",
            "_folding",
            "_fuse",
            "_neighbours",
            "_planning",
            "_portable",
            "_report",
            "_spec",
        },
        "qat": {
            "_array_ops",
            "_calls",
            "_fold",
            "_folding",
            "_functions",
            "_fuse",
            "_neighbours",
            "_planning",
            "_portable",
            "_quantization",
            "_report",
            "_spec",
            "_tracing",
            "_transforms",
            "functional",
            "modules",
            "quantize",
        },
        "_neighbours": {"_folding", "_planning", "_tracing", "modules", "sync"},
        "_planning": {"_folding", "_spec", "_tracing", "modules"},
        "_folding": {"_tracing", "functional", "modules"},
        "_tracing": set(),
        "_native": {"_arguments", "_portable", "_spec"},
        "_arguments": {"_spec"},
        "_portable": set(),
    },
    "triton": {
        "__init__": {"_fused", "_verbs"},
        "_fused": {"_plan", "_verbs"},
        "_verbs": {
            "_backward",
            "_moments",
            "_normalize",
            "_plan",
            "_resident_backward",
            "_resident_forward",
        },
        "_resident_forward": {"_held", "_moments", "_tiles"},
        "_resident_backward": {"_backward", "_held", "_tiles"},
        "_backward": {"_tiles"},
        "_normalize": {"_tiles"},
        "_moments": {"_tiles"},
        "_held": set(),
        "_tiles": set(),
        "_plan": set(),
    },
    "jax": {
        "__init__": {"_ops", "_spec", "functional"},
        "linen": {"_flax", "_linen_quantize", "_spec", "_transformed"},
        "nnx": {"_flax", "_nnx_quantize", "_spec", "_transformed"},
        "equinox": {"_arguments", "_spec", "_transformed", "functional"},
        "_linen_quantize": {"_observers", "_quantization", "_transforms"},
        "_nnx_quantize": {"_observers", "_quantization", "_transforms"},
        "_observers": {"_arguments", "_array_ops", "_quantization", "_spec"},
        "_flax": {
            "_arguments",
            "_batch",
            "_masked",
            "_spec",
            "_transformed",
            "_transforms",
            "functional",
        },
        "_batch": {
            "_calls",
            "_functions",
            "_masked",
            "_ops",
            "_portable",
            "_synchronized",
            "_transformed",
        },
        "_transformed": {"_array_ops", "_quantization", "_transforms"},
        "_array_ops": {"_quantization"},
        "_masked": {"_ops", "_results", "_synchronized", "functional"},
        "functional": {"_arguments", "_functions", "_ops", "_results", "_spec", "_synchronized"},
        "_synchronized": {"_calls", "_meshes", "_ops", "_portable"},
        "_functions": {"_arguments", "_array_ops", "_ops", "_portable", "_results", "_spec"},
        "_ops": {"_calls", "_meshes", "_portable"},
        "_calls": {"_core", "_meshes", "_portable", "_spec"},
        "_meshes": set(),
        "_arguments": {"_portable", "_spec"},
        "_portable": set(),
    },
    "keras": {
        "__init__": {"_explain", "_fold", "_fuse", "_quantize", "_spec", "layers"},
        "_fold": {"_folding", "_fuse", "_neighbours", "_report", "_spec", "layers"},
        "_neighbours": {"_folding"},
        "_explain": {"_folding", "_report", "layers"},
        "layers": {"_batch_norm", "_renorm", "_spec", "_transformed", "_transforms"},
        "_batch_norm": {"_groups", "_renorm", "_synchronized", "_transformed"},
        "_transformed": {"_dispatch", "_spec", "_transforms"},
        "_quantize": {"_dispatch", "_quantization", "_transforms"},
        "_groups": set(),
        "_renorm": set(),
        "_synchronized": {"torch"},
        "_fuse": {"_folding", "layers"},
        "_folding": {"_spec", "layers"},
    },
    "onnx": {
        "__init__": {"_patterns", "_report", "_spec"},
        "_patterns": {"_folding", "_graph", "_report"},
        "_graph": set(),
    },
}
FRAMEWORKS = {"torch", "jax", "tensorflow", "keras", "flax", "equinox", "triton"}
# What an adapter may import besides its own framework: libraries on it, or the backends under it.
BESIDE = {"triton": {"torch"}, "jax": {"flax", "equinox"}, "keras": {"tensorflow", "torch"}}


def imports_of(path: Path) -> set[str]:
    """All modules that a file imports, by dotted name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """The modules of fusebn that a file imports, by their last name."""
    own = set()
    for name in imports_of(path):
        package, _, rest = name.partition(".")
        if package == "fusebn" and rest:
            own.add(rest.removeprefix(f"{path.parent.name}.").partition(".")[0])
    folders = {SOURCE, path.parent}
    modules = {p.stem for folder in folders for p in folder.glob("*.py*")}
    modules |= {p.name for p in SOURCE.iterdir()} - {path.parent.name}
    return own & modules


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.py")), ids=lambda path: path.stem)
def test_arrows_point_down(path):
    assert path.stem in ARROWS, f"{path.name} has no place in the house: give it one here"
    assert own_imports(path) <= ARROWS[path.stem]


@pytest.mark.parametrize(
    "path",
    [path for adapter in ADAPTER_ARROWS for path in sorted((SOURCE / adapter).glob("*.py"))],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_arrows_point_down_in_an_adapter(path):
    arrows = ADAPTER_ARROWS[path.parent.name]
    assert path.stem in arrows, f"{path.name} has no place in the house: give it one here"
    assert own_imports(path) <= arrows[path.stem]
    packages = {name.partition(".")[0] for name in imports_of(path)}
    assert packages & FRAMEWORKS <= {path.parent.name} | BESIDE.get(path.parent.name, set())


def test_the_command_line_uses_public_names_only():
    # The benchmark measures floors and asks the oracle, and does so in one place.
    inside = SOURCE / "cli" / "bench" / "inside.py"
    assert own_imports(inside) >= {"_core", "_reference"}
    for path in set((SOURCE / "cli").rglob("*.py")) - {inside}:
        private = {name for name in own_imports(path) if name.startswith("_")}
        assert not private, f"{path.name} imports {private}"


def test_no_framework_is_imported_by_the_numpy_side():
    for path in SOURCE.glob("*.py"):
        packages = {name.partition(".")[0] for name in imports_of(path)}
        assert not packages & FRAMEWORKS, path.name


def test_the_arrow_test_can_fail(tmp_path):
    path = tmp_path / "_spec.py"
    path.write_text("from fusebn._numpy import moments\nimport torch\n")
    assert own_imports(path) == {"_numpy"}
    assert "torch" in imports_of(path)


def test_the_core_knows_no_python_and_no_framework():
    for path in (KERNELS / "core").iterdir():
        for included in re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text()):
            assert not re.search("python|nanobind|numpy|xla|tensorflow|torch", included, re.I), path


def test_the_core_never_says_momentum():
    for path in [*KERNELS.rglob("*.cpp"), *KERNELS.rglob("*.h")]:
        assert "momentum" not in path.read_text(), path


def test_public_names_are_sorted_documented_and_shown():
    assert sorted(fusebn.__all__) == fusebn.__all__
    for name in fusebn.__all__:
        text = inspect.getdoc(getattr(fusebn, name))
        assert text, name
        if inspect.isfunction(getattr(fusebn, name)):
            assert "Examples\n--------" in text, name


@pytest.mark.parametrize(
    "module", ["_numpy", "jax._functions", "tensorflow._functions", "torch._functions"]
)
def test_functions_take_what_their_adapter_takes(module):
    adapter_module = import_module(f"fusebn.{module}")
    assert adapter_module.__all__ == _numpy.__all__
    for name in _numpy.__all__:
        public = inspect.signature(getattr(fusebn, name)).parameters
        adapter = inspect.signature(getattr(adapter_module, name)).parameters
        shared = [p for p in adapter if p != "operation"]
        assert list(public) == shared, name
        for parameter in public:
            assert public[parameter].default == adapter[parameter].default, (name, parameter)


def test_names_of_files_stand_in_the_map():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    adapters = [path for adapter in ADAPTER_ARROWS for path in (SOURCE / adapter).glob("*.py")]
    modules = [*SOURCE.glob("_*.py"), *adapters]
    for path in [*modules, *(KERNELS / "core").iterdir(), *(KERNELS / "bindings").iterdir()]:
        if path.stem not in {"__init__", "__main__"}:
            assert path.stem in text, f"{path.name} is not in ARCHITECTURE.md"
