"""``python -m forge_lightning.cli``."""

import sys

from forge_lightning.cli.main import main

sys.exit(main())
