"""Checks for layers of your own: the contract that ours keep, and the memory that they take."""
