"""A dashboard in Weights & Biases for the runs of a project, by the package wandb-workspaces."""

from __future__ import annotations

from typing import Any

from sapo_rl.errors import UserError, first_line

NAME = "sapo-train"
SECTIONS = {
    "Is it learning?": {
        "reward, and on held-out prompts": ["reward/mean", "eval/reward"],
        "groups that teach nothing": ["group/zero_spread_fraction"],
        "length": ["completions/mean_length", "eval/mean_length"],
        "cut by the limit": ["completions/clipped_ratio"],
    },
    "Is it stable?": {
        "entropy": ["policy/entropy"],
        "gradient norm": ["policy/grad_norm", "policy/grad_norm_max"],
        "largest and smallest ratio": ["policy/ratio_max", "policy/ratio_p99", "policy/ratio_min"],
        "distance from the rollouts' policy, and from the first": ["policy/kl_old_k3", "policy/kl_ref"],
        "vLLM and the trainer disagree by": ["mismatch/probe_logp_diff", "mismatch/kl_k3"],
    },
    "Is the gate doing anything?": {
        "mean weight by the advantage's sign": ["policy/weight_mean_pos", "policy/weight_mean_neg"],
        "mean weight with and against the advantage": ["policy/weight_mean_with", "policy/weight_mean_against"],
        "tokens that are more than halved": ["policy/weight_below_half"],
        "tokens outside GRPO's clip": ["policy/outside_clip_fraction"],
        "bound of a gate on sequences": ["policy/sequence_gate_bound"],
    },
    "Is the machine busy?": {
        "tokens a second": ["perf/tokens_per_second"],
        "seconds": ["time/rollout", "time/reward", "time/old_logps", "time/update", "time/sync", "time/wait"],
        "engines idle": ["rollout/idle_fraction"],
        "peak memory in GiB": ["perf/peak_memory_gib"],
        "staleness": ["rollout/staleness"],
    },
}
"""Curves by panel and section."""


def publish(project: str) -> str:
    """Save the dashboard in `PROJECT` or `ENTITY/PROJECT`; return its address.

    Raises:
        UserError: the package is missing, or W&B refuses it.
    """
    entity, _, name = project.rpartition("/")
    try:
        import wandb

        workspace = build(entity or str(wandb.Api().default_entity), name)
        workspace.save()
    except ImportError as error:
        raise UserError(f"--wandb: needs a package: pip install 'sapo-train[dashboard]' ({error})") from error
    except Exception as error:  # of the network, the account or the project
        raise UserError(f"--wandb: W&B does not take the dashboard of '{project}': {first_line(error)}") from error
    return str(workspace.url)


def build(entity: str, project: str) -> Any:
    """Return the workspace, without any contact to W&B."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    sections = [
        workspaces.Section(
            name=question,
            is_open=True,
            panels=[panels.LinePlot(title=title, x="step", y=[*names]) for title, names in plots.items()],
        )
        for question, plots in SECTIONS.items()
    ]
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections)
