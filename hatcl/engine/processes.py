"""Several processes that learn as one, if `torch.distributed` was initialised (`torchrun`)."""

from __future__ import annotations

from torch import distributed


def place() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) if it is alone."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def wait_for_all() -> None:
    """Wait until all processes have reached this point."""
    if place()[1] > 1:
        distributed.barrier()
