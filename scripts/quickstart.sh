#!/usr/bin/env bash
# From a bare machine to a trained model: environment, then `sapo-train config=quickstart`, which gets its model by itself.
#
#   bash scripts/quickstart.sh [OVERRIDE ...]      e.g. trainer.steps=40 loss.name=grpo
#
# A second call reuses both.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" quickstart
say "training: sapo-train config=quickstart $*"
exec .venv/bin/sapo-train config=quickstart "$@"
