"""The tables over several tasks; see :mod:`tools.fill_docs`."""

from parapolicy.evaluate.report.gather import episode_table, gather_runs
from parapolicy.evaluate.report.markdown import pooled_table
from parapolicy.evaluate.report.pooled import pool
from tools.fill_docs import TASKS, Folders, summary_of, table, with_interval


def task_scores_table(folders: Folders) -> str:
    """A row per task, a column per sampler: mean maximum rewards."""
    summary = summary_of(folders, tasks=None)
    samplers = list(dict.fromkeys(summary["sampler"]))
    rows = []
    for env, task in summary.groupby("env", sort=False):
        scores = task.set_index("sampler")
        texts = [
            with_interval(
                "{:.2f}", scores.loc[name, "reward"], [scores.loc[name, f"reward_{end}"] for end in ("low", "high")]
            )
            if name in scores.index
            else ""
            for name in samplers
        ]
        rows.append([TASKS.get(str(env), str(env)), str(scores["episodes"].max()), *texts])
    return table(["mean max reward", "episodes", *samplers], rows)


def tasks_together_table(folders: Folders) -> str:
    """Scores over all tasks."""
    return pooled_table(pool(episode_table(gather_runs(folders))))
