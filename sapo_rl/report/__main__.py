"""`python -m sapo_rl.report` is `sapo-report`."""

from __future__ import annotations

import sys

from sapo_rl.report.cli import main

if __name__ == "__main__":
    sys.exit(main())
