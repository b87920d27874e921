"""What a kind of data means for a run: which model, which arrays, which tests. Images and instructions so far."""

from fedjax_qp.tasks.images import image_task
from fedjax_qp.tasks.instructions import instruction_task
from fedjax_qp.tasks.task import Task

__all__ = ["Task", "image_task", "instruction_task"]
