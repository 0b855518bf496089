"""What needs device-mapper lies in `inside`, and is collected only where `python -m tests.kernel` runs it."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("RUNVOL_KERNEL_TIER") else ["inside"]
