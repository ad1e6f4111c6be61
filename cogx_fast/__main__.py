"""``python -m cogx_fast``."""

import sys

from cogx_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
