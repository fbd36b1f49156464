"""``python -m ibq_scale``."""

import sys

from ibq_scale.cli.main import main

sys.exit(main())
