"""Lines on stderr."""

import sys

_LONGEST_LINE = 1000


def note(message: str) -> None:
    """Prints one line on stderr; a long one loses its middle."""
    line = " ".join(message.split())
    if len(line) > _LONGEST_LINE:
        line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    print("eqx_cogvae:", line, file=sys.stderr)


__all__ = ["note"]
