"""The option files that come with the package: `train/` and `test/`, by network."""

from pathlib import Path

OPTIONS = Path(__file__).resolve().parent
"""The folder of these files."""
