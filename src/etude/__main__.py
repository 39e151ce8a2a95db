"""`python -m etude`: the command line, also as what `torchrun -m etude` starts."""

import sys

from etude.app.main import main

if __name__ == "__main__":
    sys.exit(main())
