"""`sparse-sr train`: train a network from an option file, with BasicSR."""

import argparse

from sparse_sr_attn.cli import basicsr
from sparse_sr_attn.cli.basicsr import run

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Train a network from an option file, with BasicSR.

examples:
  sparse-sr train -opt train.yml
  sparse-sr train -opt train.yml --auto_resume                       resume from the newest saved state
  sparse-sr train -opt train.yml --force_yml train:total_iter=1000 num_gpu=0
  torchrun --nproc_per_node 4 -m sparse_sr_attn train -opt train.yml --launcher pytorch"""
EPILOG = "experiments/ and tb_logger/ are written to the working directory."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    basicsr.add_arguments(parser)
    parser.add_argument(
        "--auto_resume", action="store_true", help="resume from the newest state in experiments/, if there is one"
    )
