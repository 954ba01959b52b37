#!/usr/bin/env bash
# From a bare machine to a trained model: environment, then `sapo-train config=quickstart`, which gets its model by itself.
#
#   bash scripts/quickstart.sh [OVERRIDE ...]      e.g. trainer.steps=40 loss.name=grpo
#
# A second call reuses both.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" quickstart
has_bfloat16='import sys; from sapo_rl.sizing import has_bfloat16; sys.exit(not has_bfloat16())'
if grep -qw cpu "$stamp" && [[ "$*" != *model.dtype=* ]] && ! .venv/bin/python -c "$has_bfloat16"; then
    say "this processor has no instructions for bfloat16: it computes in float32, which is faster here"
    set -- model.dtype=float32 "$@"
fi
say "training: sapo-train config=quickstart $*"
exec .venv/bin/sapo-train config=quickstart "$@"
