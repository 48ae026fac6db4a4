"""The entry of `python -m eqx_cogvae`."""

import io
import sys
import warnings
from collections.abc import Sequence

import click
import jax

import eqx_cogvae as cv

from . import clips, dataset, info
from .messages import note

_OUT_OF_MEMORY = (
    "out of memory; give a smaller --size, or --dtype bfloat16: "
    "`info MODEL --frames N --size HxW` says what a size takes"
)


@click.group(
    "eqx_cogvae",
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(cv.__version__, prog_name="eqx_cogvae", message="%(prog)s %(version)s")
def commands() -> None:
    """Reconstructs, encodes and decodes clips and datasets, and looks at models."""


for _command in (
    clips.reconstruct,
    clips.encode,
    clips.decode,
    dataset.encode,
    dataset.decode,
    info.info,
):
    commands.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    That is 2 for a user's mistake, which is one line on stderr, and 130 for an interruption.
    """
    for stream in (sys.stdout, sys.stderr):
        # A file's name may hold bytes that are no text.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *rest, **more: note(f"warning: {message}")
            # Click's own `main` would print a traceback's worth of its own for an interruption.
            with commands.make_context("python -m eqx_cogvae", words) as context:
                return commands.invoke(context) or 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        note(f"error: {error.format_message().rstrip('.')}; see --help")
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    except (ValueError, OSError, ImportError) as error:
        note(f"error: {error}")
    except MemoryError:
        note(f"error: {_OUT_OF_MEMORY}")
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            error = _OUT_OF_MEMORY
        elif isinstance(error, jax.errors.JaxRuntimeError):
            raise
        note(f"error: {error}")
    return 2


__all__ = ["main"]
