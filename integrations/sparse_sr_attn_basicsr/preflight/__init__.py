"""Checks of an option file before anything is loaded or written.

BasicSR reports an invalid option where it first uses it, minutes into a run, and ignores unknown names. `check` checks
all options first and reports all problems together.
"""

from collections.abc import Mapping
from typing import Any

from sparse_sr_attn_basicsr.preflight import datasets, networks, sections, training_options, validation
from sparse_sr_attn_basicsr.preflight.findings import Findings


def check(options: Mapping[str, Any], *, training: bool, launcher: str = "none") -> tuple[dict[str, Any], list[str]]:
    """Return the options, ready for BasicSR, and remarks on what is valid but probably a mistake.

    Args:
        options: options of a whole option file. Relative paths are relative to the working directory.
        training: whether they are for training or for testing.
        launcher: BasicSR's `--launcher`.

    Returns:
        A copy in which numbers given as text are converted, and every option that BasicSR requires is present.

    Raises:
        ConfigError: names all problems, each with its path. Nothing was loaded or written.
    """
    findings = Findings(options, training)
    sections.check(findings, launcher)
    multiples = networks.check(findings)
    sections.check_model(findings)
    if training:
        training_options.check(findings)
    metrics = validation.check(findings)
    sections.check_weights(findings)
    datasets.check(findings, metrics)
    networks.check_model_lookups(findings, multiples)
    findings.problems.raise_if_any()
    return findings.options, findings.remarks
