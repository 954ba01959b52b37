"""`vllm serve` without the rest of vLLM's command line, which asks for a version that the CPU's package does not have.

Arguments are those of `vllm serve`, the model as `--model`.
"""

from __future__ import annotations

import os
import tempfile

from sapo_rl.processes import die_with_parent
from sapo_rl.rollout import scratch

# vLLM's core and its workers, which are spawned and so import this too, would outlive a server that is killed.
if __name__ == "__mp_main__":
    die_with_parent()


def main() -> None:
    """Serve until stopped."""
    with scratch.temporary_folder() as folder:
        os.environ.update(scratch.variables(folder, os.environ))
        tempfile.tempdir = None  # read the variable again
        _serve()


def _serve() -> None:
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="sapo-serve")
    (command,) = cmd_init()
    arguments = command.subparser_init(parser.add_subparsers()).parse_args()
    assert arguments is not None
    command.validate(arguments)
    command.cmd(arguments)


if __name__ == "__main__":
    main()
