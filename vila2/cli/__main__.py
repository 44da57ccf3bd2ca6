"""`python -m vila2.cli` is `vila2-fast`."""

import sys

from vila2.cli.main import main

sys.exit(main())
