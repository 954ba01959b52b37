"""`python -m sapo_rl` is `sapo-train`."""

from __future__ import annotations

from sapo_rl.cli import main

if __name__ == "__main__":
    main()
