"""A plugin of pytest: what JAX spends on the programs of each test, `--compile-times` shows.

Tracing, lowering and XLA's compiling are measured by JAX itself, in the processes of the tests;
what tests start in other processes is not seen.
"""

import jax
import pytest

_PHASES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
_SHOWN = 40
_spent = dict.fromkeys(_PHASES.values(), 0.0)


def pytest_addoption(parser):
    parser.addoption(
        "--compile-times",
        action="store_true",
        help="show the tests whose programs take longest to trace, lower and compile",
    )


def pytest_configure(config):
    if config.getoption("--compile-times"):
        jax.monitoring.register_event_duration_secs_listener(_measure)


def _measure(event, seconds, **_):
    if event in _PHASES:
        _spent[_PHASES[event]] += seconds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Hands a test's seconds on with its last report, which reaches the main process."""
    if call.when == "teardown" and item.config.getoption("--compile-times"):
        item.user_properties.append(("jax", dict(_spent)))
        _spent.update(dict.fromkeys(_spent, 0.0))
    return (yield)


def pytest_terminal_summary(terminalreporter):
    rows = [
        (value, report.nodeid)
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "jax"
    ]
    if not rows:
        return
    terminalreporter.section("seconds of tracing, lowering and compiling")
    rows.sort(key=lambda row: -sum(row[0].values()))
    total = {phase: sum(row[0][phase] for row in rows) for phase in _spent}
    for value, name in [(total, f"all {len(rows)}"), *rows[:_SHOWN]]:
        line = " ".join(f"{value[phase]:8.2f}" for phase in _spent)
        terminalreporter.line(f"{line} {name}")
