"""``python -m forge_lightning``: the same as ``forge-fit``."""

import sys

from forge_lightning.cli.main import main

sys.exit(main())
