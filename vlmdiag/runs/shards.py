"""Which share of a run this process has, by what SLURM and torchrun tell it: --shard auto.

    SLURM array     SLURM_ARRAY_TASK_ID in SLURM_ARRAY_TASK_MIN, MIN + STEP, ... of COUNT
    srun            SLURM_PROCID of SLURM_STEP_NUM_TASKS, else SLURM_NTASKS
    torchrun        RANK of WORLD_SIZE

Together they count like digits: every task of every array index, and every rank that a torchrun of
its own starts within a task, is a shard of its own. torchrun over several nodes of one srun already
counts them all.
"""

from __future__ import annotations

from collections.abc import Mapping

Shard = tuple[int, int]  # i of n, from 0


def auto(environment: Mapping[str, str]) -> Shard:
    """(i, n) of this process. ValueError says in one line what is missing or does not fit."""
    array, task, rank = _array(environment), _task(environment), _rank(environment)
    parts = [part for part in (array, _joined(task, rank, environment)) if part is not None]
    if not parts:
        raise ValueError(
            "auto needs SLURM's or torchrun's variables (SLURM_ARRAY_TASK_ID, SLURM_PROCID or RANK"
            " with their counts), and none is set: give i/n"
        )
    index, shards = 0, 1
    for part_index, part_shards in parts:
        index, shards = index * part_shards + part_index, shards * part_shards
    return index, shards


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if not text:
        return None
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"auto: {name} is {text[:40]!r}, which is no number")
    return int(text)


def _pair(environment: Mapping[str, str], index_name: str, *count_names: str) -> Shard | None:
    """The value of a variable and the first of those that say of how many it is one."""
    index = _number(environment, index_name)
    counts = [(name, _number(environment, name)) for name in count_names]
    name, count = next((pair for pair in counts if pair[1] is not None), (count_names[-1], None))
    if index is None and count is None:
        return None
    if index is None or count is None:
        lacking = index_name if index is None else " and ".join(count_names)
        raise ValueError(f"auto: {name if count else index_name} is set and {lacking} is not")
    if index >= count:
        raise ValueError(f"auto: {index_name} is {index}, of {name} {count}: both count from 0")
    return index, count


def _array(environment: Mapping[str, str]) -> Shard | None:
    """The place in an array, whose indices need not begin at 0."""
    names = ("TASK_ID", "TASK_COUNT", "TASK_MIN", "TASK_MAX", "TASK_STEP")
    index, count, low, high, step = (_number(environment, f"SLURM_ARRAY_{name}") for name in names)
    if index is None:
        return None
    low, step = low or 0, step or 1
    if count is None and high is None:
        raise ValueError(
            "auto: SLURM_ARRAY_TASK_ID is set, and neither SLURM_ARRAY_TASK_COUNT nor"
            " SLURM_ARRAY_TASK_MAX is"
        )
    by_range = None if high is None else (high - low) // step + 1
    of = count if count is not None else by_range or 0
    place, rest = divmod(index - low, step)
    if by_range not in (None, of) or rest or not 0 <= place < of:
        raise ValueError(
            f"auto: the array's {of} indices are no range from {low} in steps of {step}, or"
            f" {index} is none of them: submit a range such as 0-{max(of, 1) - 1}, or give i/n"
        )
    return place, of


def _task(environment: Mapping[str, str]) -> Shard | None:
    """The place among the tasks of an srun."""
    is_step = any(environment.get(name) for name in ("SLURM_STEP_ID", "SLURM_STEPID"))
    if "SLURM_PROCID" not in environment and not is_step:
        return None  # an allocation, whose tasks have not been started
    task = _pair(environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if task and task[1] > 1 and not is_step and environment.get("SLURM_JOB_ID"):
        raise ValueError(
            f"auto: the job has {task[1]} tasks, and this is the batch script, which runs once:"
            " start the command with srun"
        )
    return task


def _rank(environment: Mapping[str, str]) -> Shard | None:
    """The place among torchrun's processes."""
    return _pair(environment, "RANK", "WORLD_SIZE")


def _joined(task: Shard | None, rank: Shard | None, environment: Mapping[str, str]) -> Shard | None:
    """The place among all processes of a job. torchrun's counts those of all nodes, if the tasks
    of srun are its agents; else each task has started one of its own."""
    if task is None or rank is None:
        return task or rank
    agents = _number(environment, "GROUP_WORLD_SIZE")
    if task[1] == 1 or agents == task[1]:
        return rank
    if agents == 1 or rank[1] == 1:
        return task[0] * rank[1] + rank[0], task[1] * rank[1]
    if task == rank:
        return task
    raise ValueError(
        f"auto: srun says task {task[0]} of {task[1]} and RANK, WORLD_SIZE say {rank[0]} of"
        f" {rank[1]}: unset those that do not count, or give i/n"
    )
