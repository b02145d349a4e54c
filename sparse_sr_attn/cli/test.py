"""`sparse-sr test`: test a trained network from an option file, with BasicSR."""

import argparse

from sparse_sr_attn.cli import basicsr
from sparse_sr_attn.cli.basicsr import run

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Test a trained network from an option file, with BasicSR.

examples:
  sparse-sr test -opt test.yml
  sparse-sr test -opt test.yml --force_yml path:pretrain_network_g=net_g_latest.pth"""
EPILOG = "results/ is written to the working directory."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    basicsr.add_arguments(parser)
    parser.set_defaults(auto_resume=False)
