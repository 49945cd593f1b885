"""The command ``byol``."""

import signal
import sys

from byol._byol import main as _main


def main() -> int:
    """Run the command with the arguments of this process and return its exit code."""
    # Python's handler would wait for the native code to return.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _main(["byol", *sys.argv[1:]], [sys.executable, "-m", "byol"])


if __name__ == "__main__":
    sys.exit(main())
