"""Strict JAX, cached compilation, how processes share the tests, and what CI does not skip."""

import gc
import os
from pathlib import Path

# Two processes share two cores: torch's threads would wait for one another, spinning. torch reads
# this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import jax
import jaxtyping
import pytest
from hypothesis.database import DirectoryBasedExampleDatabase
from programs import forget_if_many

pytest_plugins = ["compile_times"]
ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most programs are tiny, and together cost more than any large one: all are kept.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# Two habits that take a tenth of the time each: noting where in Python each operation of a program
# comes from, and looking for cycles among the millions of objects that tracing makes.
jax.config.update("jax_include_full_tracebacks_in_locations", False)
jax.config.update("jax_traceback_in_locations_limit", 0)
gc.set_threshold(50_000, 20, 100)

# The first example of a property may compile for longer than any deadline allows.
_OPTIONS = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
    "print_blob": True,
}
hypothesis.settings.register_profile("ci", derandomize=True, database=None, **_OPTIONS)
hypothesis.settings.register_profile(
    "local", database=DirectoryBasedExampleDatabase(ROOT / ".hypothesis" / "examples"), **_OPTIONS
)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "local")


_FIRST = (
    *("test_sharding", "test_autoencoder", "test_lowering", "test_notebooks", "test_examples"),
    *("test_layers", "test_cli", "test_training", "test_transforms", "test_plan", "test_tiles"),
)


def pytest_collection_modifyitems(items):
    """Begins with what takes longest, so that no process waits for another's last file."""
    rank = {name: place for place, name in enumerate(_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session):
    """Fails where CI skips a test: there only a GPU is missing."""
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    if "CI" in os.environ and reporter is not None:
        skipped = {report.nodeid for report in reporter.stats.get("skipped", ())}
        if wrong := {name for name in skipped if not name.startswith("tests/test_gpu.py")}:
            reporter.write_line(f"skipped, which CI does not allow: {', '.join(sorted(wrong))}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return (yield)


@pytest.fixture(autouse=True)
def _few_programs():
    yield
    forget_if_many()


@pytest.fixture
def unchecked():
    """Without the annotations' own checks, which come first, as a user has it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
