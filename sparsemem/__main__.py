"""`python -m sparsemem`."""

import sys

from sparsemem.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
