"""`python -m fedsplit` is the `fedsplit` command."""

import sys

from fedsplit.cli import main

if __name__ == "__main__":
    sys.exit(main())
