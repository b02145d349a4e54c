"""How many kernels a GPU launches for layers and networks, counted without one."""
