"""What may befall a drawing process; here, since a process that is told so imports this file, and should not import torch."""

import os


def die(task: object) -> None:
    os._exit(1)


def lack_memory(task: object) -> None:
    raise MemoryError
