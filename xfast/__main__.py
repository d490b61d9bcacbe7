"""``python -m xfast``."""

import sys

from xfast.cli.main import main

sys.exit(main())
