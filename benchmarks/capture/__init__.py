"""The share of dense attention that the keys of sparse patterns capture."""
