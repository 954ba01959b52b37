#!/usr/bin/env bash
# Everything that a change must pass: lint, types, unit tests, then the end-to-end tests with real vLLM.
#
#   bash scripts/test.sh                       all of it, a quarter of an hour on two cores
#   bash scripts/test.sh --fast                lint, and the unit tests that need no vLLM and start no run, two minutes
#   bash scripts/test.sh PYTEST-ARGUMENT ...   pytest alone, e.g. -m "not e2e", or tests/losses
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dashboard dev docs endpoint gym math mlflow openenv tensorboard textarena trackio verifiers
# Without a marker, but not fast: they load vLLM, start programs, or wait for what hangs.
slow=(
    tests/engines/test_child.py
    tests/engines/test_process.py
    tests/engines/test_vllm_serve.py
    tests/rewards/test_reward_code.py
    tests/rewards/test_reward_pool.py
    tests/run/test_fuzz.py
    tests/run/test_serve.py
    tests/run/test_signals.py
    tests/run/test_sweep.py
    tests/telemetry/test_report_browser.py
    tests/test_bench.py
    tests/test_packaging.py
    tests/test_sandbox.py
)
if [ $# -gt 0 ] && [ "$*" != --fast ]; then
    exec .venv/bin/python -m pytest "$@"
fi
from_apt() { # PROGRAM PACKAGE WHAT: what is not tested without it
    if command -v "$1" >/dev/null || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return; fi
    say "installing $2"
    { apt-get install -y "$2" || { apt-get update && apt-get install -y "$2"; }; } >>.venv/setup.log 2>&1 ||
        say "there is none to be had: tests of $3 are skipped"
}
from_apt bwrap bubblewrap "the sandbox"
from_apt chromium chromium "the page of sapo-report"
openenv() { # a server's Python, over the packages of .venv: it wants other versions of some than vLLM
    local own=.venv/openenv
    export OPENENV_PYTHON=$PWD/$own/bin/python
    if [ -f $own/ready ]; then return; fi
    say "installing openenv's server"
    if ! {
        .venv/bin/python -m venv --clear --without-pip $own
        .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$(echo $own/lib/python*/site-packages)/over.pth"
        $OPENENV_PYTHON -m pip install --no-input --no-compile --no-deps openenv==0.10.0 &&
            $OPENENV_PYTHON -m pip install --no-input --no-compile 'fastmcp>=3,<4' && touch $own/ready
    } >>.venv/setup.log 2>&1; then
        say "there is none to be had: its tests are skipped"
        unset OPENENV_PYTHON
    fi
}
torchao() { # in a folder of its own: where it is installed, transformers imports it in every process, for seconds
    export TORCHAO=$PWD/.venv/torchao
    if [ -d "$TORCHAO/torchao" ]; then return; fi
    say "installing torchao"
    if ! .venv/bin/python -m pip install --no-input --no-compile --no-deps --target "$TORCHAO" torchao==0.18.0 >>.venv/setup.log 2>&1; then
        say "there is none to be had: its tests are skipped"
        unset TORCHAO
    fi
}
failed=""
say "ruff"
.venv/bin/ruff check --output-format concise || failed="$failed ruff"
if [ "${1:-}" = --fast ]; then
    chosen=(-n 2 -m "not (e2e or multi or gpu)" "${slow[@]/#/--ignore=}")
else
    openenv
    torchao
    .venv/bin/pyright >.venv/pyright.log 2>&1 & # on what the workers leave of the cores
    types=$!
    chosen=(-n 3 --durations=10) # one of three mostly waits for a process, a time limit or a server
fi
say "pytest"
.venv/bin/python -m pytest "${chosen[@]}" --dist loadfile --no-loadscope-reorder || failed="$failed pytest"
if [ -n "${types:-}" ]; then
    say "pyright"
    wait "$types" || failed="$failed pyright"
    cat .venv/pyright.log
fi
[ -z "$failed" ] || die "failed:$failed"
say "all passed"
