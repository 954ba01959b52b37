#!/usr/bin/env bash
# From a bare machine to a trained model: environment, SmolLM2-135M-Instruct, then `sapo-train config=quickstart`.
#
#   bash scripts/quickstart.sh [OVERRIDE ...]      e.g. trainer.steps=40 loss.name=grpo
#
# A second call reuses the environment and the model.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" quickstart
say "model"
.venv/bin/python scripts/fetch_model.py
say "training: sapo-train config=quickstart $*"
exec .venv/bin/sapo-train config=quickstart "$@"
