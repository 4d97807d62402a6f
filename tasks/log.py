"""Lines in the log of a run."""

from prefect import get_run_logger
from prefect.exceptions import MissingContextError

from tasks.errors import masked
from tasks.stand_in import plannable


@plannable
def log(line: str, warning: bool = False) -> None:
    """Log one line in the run's log. Without a run (unit tests, scripts), print it.

    Lines have ids and counts, never texts of users. Passwords in URLs are masked.
    """
    line = masked(line)
    try:
        logger = get_run_logger()
    except MissingContextError:
        print(line)
    else:
        (logger.warning if warning else logger.info)(line)
