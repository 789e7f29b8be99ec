"""Former name of `xfm_fast.io`."""

from xfm_fast.io import *  # noqa: F403
from xfm_fast.io import MOST_DEPTH as MOST_DEPTH
