"""Statistics that the processes of distributed training make one."""

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_sr_attn.errors import ProcessError


def several_processes() -> bool:
    """Return whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(statistics: Tensor, what: str) -> Tensor:
    """Return the statistics of all processes, those of the first one first: the same bits on each.

    Args:
        statistics: of this process; of one shape and dtype on all.
        what: gathers them, for the message.

    Raises:
        ProcessError: a process ended, or did not come here within the timeout of the process group.
    """
    parts = [torch.empty_like(statistics) for _ in range(dist.get_world_size())]
    try:
        dist.all_gather(parts, statistics)
    except RuntimeError as error:
        raise ProcessError(
            f"process {dist.get_rank()} of {len(parts)}: {what} joins the statistics of all processes in each forward "
            "in training, so all must make the same number of forwards; another one ended, or made none within the "
            "timeout of the process group. If one of them runs out of batches first, "
            "`with model.join(throw_on_early_termination=True):` (of DistributedDataParallel) ends all at once. "
            f"({error})"
        ) from error
    return torch.stack(parts)
