"""The command `splitnet`, also as `python -m splitnet`."""

from __future__ import annotations

import sys

from splitnet import foreign_modules


def main() -> None:
    """Runs the command line. Exits with a message if another project's modules hide splitnet's."""
    try:
        from splitnet.cli.main import main as run
    except ImportError:
        if sentences := foreign_modules():
            sys.exit("error: " + "\n".join(sentences))
        raise
    run()


if __name__ == "__main__":
    main()
