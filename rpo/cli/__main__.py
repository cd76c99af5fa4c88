"""`python -m rpo.cli`: the same as `rpo`."""

import sys

from rpo.cli.main import main

sys.exit(main())
