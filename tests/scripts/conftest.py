import pytest
from transformers.utils import logging


@pytest.fixture(autouse=True)
def _verbosity():
    """Scripts silence transformers for their whole process; the tests that share this one read its warnings."""
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(before[0])
    if before[1]:
        logging.enable_progress_bar()
