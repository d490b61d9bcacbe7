"""``python -m xfast``."""

import sys

from xfast.cli import main

sys.exit(main())
