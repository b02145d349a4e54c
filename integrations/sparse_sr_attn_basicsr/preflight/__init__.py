"""Checks of an option file before anything is loaded or written.

BasicSR meets a wrong option where it first uses it, minutes into a run, or never, when it ignores the name. `check`
looks at all options first and reports all problems together.
"""

from collections.abc import Mapping
from typing import Any

from sparse_sr_attn_basicsr.preflight import datasets, networks, sections, training_options, validation
from sparse_sr_attn_basicsr.preflight.findings import Findings


def check(options: Mapping[str, Any], *, training: bool, launcher: str = "none") -> tuple[dict[str, Any], list[str]]:
    """Return the options, ready for BasicSR, and remarks on what is legal and probably not meant.

    Args:
        options: of a whole option file. Relative paths in it start from the working directory.
        training: whether they are for training; else for testing.
        launcher: BasicSR's `--launcher`.

    Returns:
        A copy in which numbers given as text are numbers, and every option that BasicSR requires is spelt out.

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
