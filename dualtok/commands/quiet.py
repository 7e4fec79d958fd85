"""Other libraries' notices, kept out of the terminal."""

from __future__ import annotations

import logging
import os
import warnings

# Imported where they are used, for what they take to load: transformers (1 to 4 s).


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and notices out of the terminal; imports transformers."""
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    # DeepSpeed 0.19.8 calls collectives that torch 2.13 renamed, several times per step.
    renamed = r".*`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # bitsandbytes 0.50 tells every host without a GPU of a package with a faster kernel.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
