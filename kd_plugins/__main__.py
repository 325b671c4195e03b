"""`python -m kd_plugins` is the command `kd-plugins`."""

import sys

from kd_plugins.catalog.cli import main

if __name__ == "__main__":
    sys.exit(main())
