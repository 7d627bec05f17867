"""The tables over several tasks; see :mod:`tools.fill_docs`."""

from parapolicy.evaluate.measure.statistics import proportion_interval
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


def kitchen_table(folders: Folders) -> str:
    """Shares p_k of Kitchen's episodes with at least k of four subtasks done."""
    episodes = episode_table(gather_runs(folders))
    rows = []
    for sampler, own in episodes[episodes["env"] == "kitchen"].groupby("sampler", sort=False):
        done = (4 * own["reward"]).round()
        shares = [[int((done >= k).sum()), len(own)] for k in range(1, 5)]
        texts = (with_interval("{:.2f}", many / all_, proportion_interval(many, all_)) for many, all_ in shares)
        rows.append([str(sampler), f"{done.mean():.2f}", *texts])
    return table(["sampler", "subtasks, mean", "p_1", "p_2", "p_3", "p_4"], rows)
