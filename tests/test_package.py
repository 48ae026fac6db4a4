"""The package from outside: what importing it does and costs, and what it exports."""

import ast
import inspect
import re
import runpy
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import eqx_cogvae as cv
from eqx_cogvae import dataset, diffusers, training, video

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("av", "diffusers", "huggingface_hub", "optax", "ray", "torch", "tqdm")
# Repeats of each import: the median is then steady beside other work on the machine.
REPEATS = 5


def python(code):
    """The output of a fresh interpreter, and its seconds."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), time.perf_counter() - start


def test_import_brings_only_the_core():
    code = f"import sys, eqx_cogvae; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code)[0] == "[]"


def test_import_initialises_no_backend():
    # Once a backend is there, JAX refuses to change how many devices it has.
    code = """
import eqx_cogvae, jax
jax.config.update("jax_num_cpu_devices", 2)
print(jax.device_count("cpu"))
try:
    jax.config.update("jax_num_cpu_devices", 3)
except RuntimeError:
    print("refused")
"""
    assert python(code)[0].split() == ["2", "refused"]


def test_import_takes_little_longer_than_its_dependencies():
    bare, ours = [], []
    for _ in range(REPEATS):
        bare.append(python("import jax, equinox")[1])
        ours.append(python("import eqx_cogvae")[1])
    # The quickest of each: what else the machine does only adds.
    assert min(ours) < 1.5 * min(bare)


def exported(module):
    """Functions and classes, without modules, constants and type aliases."""
    names = getattr(module, "__all__", [name for name in vars(module) if name[0] != "_"])
    things = {name: getattr(module, name) for name in names}
    return {n: x for n, x in things.items() if inspect.isroutine(x) or inspect.isclass(x)}


@pytest.mark.parametrize(
    "module", [cv, dataset, diffusers, training, video], ids=lambda module: module.__name__
)
def test_every_export_has_a_docstring(module):
    # A dataclass without one has its signature there.
    things = exported(module)
    bare = [n for n, x in things.items() if not x.__doc__ or x.__doc__.startswith(f"{n}(")]
    assert len(things) > 2
    assert bare == []


def test_annotations_are_checked_in_these_tests():
    with pytest.raises(jaxtyping.TypeCheckError, match="crop_frames"):
        cv.crop_frames(jnp.zeros((3, 8, 8)), 1)


def test_a_missing_extra_is_named():
    code = """
import sys
sys.modules["optax"] = None
try:
    import eqx_cogvae.training
except ImportError as error:
    print(error)
"""
    assert 'pip install "eqx_cogvae[train]"' in python(code)[0]


def test_the_version_is_that_of_the_metadata():
    assert f'version = "{cv.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_hashes_are_of_the_versions_that_are_pinned():
    def lines(path):
        return [line for line in path.read_text().splitlines() if not line.startswith("#")]

    hashed = [
        re.fullmatch(r"(\S+)((?: --hash=sha256:[0-9a-f]{64})+)", line)
        for line in lines(ROOT / ".ci" / "hashes.txt")
    ]
    assert all(hashed)
    pins = {pin.lower() for pin in lines(ROOT / "constraints.txt")}
    assert {line[1].lower() for line in hashed} == pins
    # For CPU, and with CUDA, whose libraries have a file of their own.
    (torch,) = [line[2] for line in hashed if line[1].startswith("torch==")]
    assert torch.count("--hash") == 2
    assert all("--hash" in line for line in lines(ROOT / ".ci" / "cuda.txt"))


def lower_bound(requirement):
    (version,) = [each.version for each in requirement.specifier if each.operator == ">="]
    return requirement.name, Version(version)


def test_the_lowest_row_of_the_matrix_is_what_is_supported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = map(Requirement, sum(extras.values(), project["dependencies"]))
    pins = runpy.run_path(str(ROOT / "scripts" / "matrix.py"))["LOWEST"]
    pinned = {(name, Version(version)) for name, version in (pin.split("==") for pin in pins)}
    assert pinned == {lower_bound(each) for each in asked if each.name != "ray"}


PACKAGE = Path(cv.__file__).parent
# Who may import what; everybody may import what stands for itself, such as jax.
ALLOWED = {
    "torch": ("diffusers/", "_checkpoint/", "preview.py"),  # and where a `.pt` is read
    "diffusers": ("diffusers/",),
    "av": ("video/",),
    "optax": ("training/",),
    "ray": ("dataset/_ray.py",),
}
MODEL = {"_layers", "_resnet", "_blocks", "_autoencoder"}
ABOVE = {
    "_lowering": MODEL | {"_transforms", "video", "_cli", "dataset", "training", "diffusers"},
    "_transforms": MODEL | {"_lowering", "video", "_cli", "dataset", "training", "diffusers"},
    "_layers": {"_resnet", "_blocks", "_autoencoder", "_transforms"},
    "_resnet": {"_blocks", "_autoencoder", "_transforms"},
    "_blocks": {"_autoencoder", "_transforms"},
    "video": MODEL | {"_cli", "dataset", "training", "diffusers"},
    "dataset": {"_cli", "training", "diffusers"},
    "training": {"_cli", "diffusers"},
    "diffusers": {"_cli"},
}


def imports(path):
    """The modules that a file imports: absolute ones, and parts of this package."""
    outside, inside = set(), set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            outside.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            inside |= {name.partition(".")[0] for name in names}
    return outside, inside


def test_arrows_point_downwards():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        outside, inside = imports(path)
        wrong += [(name, m) for m in outside & ALLOWED.keys() if not name.startswith(ALLOWED[m])]
        part = name.partition("/")[0].removesuffix(".py")
        wrong += [(name, m) for m in inside & ABOVE.get(part, set())]
    assert wrong == []


def test_the_model_names_no_platform():
    words = re.compile(r"\b(xla|tpus?|gpus?|cpus?|bands?|chunk\w*)\b", re.IGNORECASE)
    found = [name for name in MODEL if words.search((PACKAGE / f"{name}.py").read_text())]
    assert found == []


def test_pixels_are_scaled_in_one_place():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value == 127.5
    }
    assert found == {"_pixels.py"}


def test_warnings_point_at_the_callers_line():
    """By `_checks.warn`, which finds it; `_config` lies below, and is called by the user alone."""
    fixed = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "stacklevel=" in path.read_text()
    }
    assert fixed == {"_checks.py", "_config.py"}
