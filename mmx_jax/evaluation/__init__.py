"""Evaluation: a model as tasks see it, tasks by name, and their results."""

from mmx_jax.evaluation.held_out import HeldOut
from mmx_jax.evaluation.model import EvalModel
from mmx_jax.evaluation.report import result_path, result_table, write_result
from mmx_jax.evaluation.routing import Routing
from mmx_jax.evaluation.task import TASKS, Task, TaskResult, find_tasks

__all__ = [
    "TASKS",
    "EvalModel",
    "HeldOut",
    "Routing",
    "Task",
    "TaskResult",
    "find_tasks",
    "result_path",
    "result_table",
    "write_result",
]
