"""The command ``byol``."""

import sys

from byol._byol import main as _main


def main() -> int:
    """Run the command with the arguments of this process and return its exit code."""
    return _main(["byol", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
