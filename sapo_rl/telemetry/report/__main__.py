"""`python -m sapo_rl.telemetry.report` is `sapo-report`."""

from __future__ import annotations

import sys

from sapo_rl.telemetry.report.cli import main

if __name__ == "__main__":
    sys.exit(main())
