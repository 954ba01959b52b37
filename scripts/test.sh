#!/usr/bin/env bash
# Everything that a change must pass: lint, types, unit tests, then the end-to-end tests with real vLLM.
#
#   bash scripts/test.sh                       all of it, 12 minutes at most on two cores
#   bash scripts/test.sh PYTEST-ARGUMENT ...   pytest alone, e.g. -m "not e2e", or tests/losses
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev gym math
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
failed=""
say "ruff"
.venv/bin/ruff check --output-format concise || failed="$failed ruff"
say "pyright"
.venv/bin/pyright || failed="$failed pyright"
say "pytest"
.venv/bin/python -m pytest --durations=10 -n 2 --dist loadfile || failed="$failed pytest"
[ -z "$failed" ] || die "failed:$failed"
