"""How operations that move a state tell a forward from its recomputation."""

import torch


def backward_is_running() -> bool:
    """Return whether this is called from inside a backward, as activation checkpointing does to compute again."""
    # The question activation checkpointing itself asks.
    return torch._C._current_graph_task_id() != -1
