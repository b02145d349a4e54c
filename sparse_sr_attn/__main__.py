"""`python -m sparse_sr_attn` is `sparse-sr`; torchrun needs a module to run."""

from sparse_sr_attn.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
