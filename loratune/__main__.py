"""`python -m loratune`: the command, where it is not on the path."""

import sys

from loratune.cli.main import main

sys.exit(main())
