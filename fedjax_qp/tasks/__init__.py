"""What a kind of examples means for a run: which model, which arrays, which tests."""

from fedjax_qp.tasks.classification import classification_task
from fedjax_qp.tasks.instructions import instruction_task
from fedjax_qp.tasks.kinds import KINDS, Kind
from fedjax_qp.tasks.task import Task

__all__ = ["KINDS", "Kind", "Task", "classification_task", "instruction_task"]
