"""`python -m eqx_cogvae`."""

import sys

from ._cli.main import main as main

if __name__ == "__main__":
    sys.exit(main())
