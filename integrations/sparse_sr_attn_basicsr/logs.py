"""The log of a run: BasicSR's logger, and a log file that survives a full disk."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import get_dist_info

_LOG = logging.getLogger(__name__)


class LogFile(logging.FileHandler):
    """A log file that reports once, without a traceback, that it cannot be written."""

    def __init__(self, file: str) -> None:
        super().__init__(file, mode="w")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
        self._failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        """Report that a line could not be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            _LOG.warning("note: the log %s is incomplete (%s); the run continues", self.baseFilename, error)


@contextmanager
def log_to(file: str) -> Iterator[logging.Logger]:
    """Add `file` to BasicSR's logger on the first process; the others log errors only."""
    logger: logging.Logger = get_root_logger()
    if get_dist_info()[0] != 0:
        logger.setLevel(logging.ERROR)
        yield logger
        return
    logger.setLevel(logging.INFO)
    handler = LogFile(file)
    logger.addHandler(handler)
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):  # a log that cannot be written
            handler.close()
