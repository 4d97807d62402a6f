"""What tests of several folders share: where they run."""

from __future__ import annotations

import os

# Before torch is imported. The models are so small that threads only wait for each other, and tests
# run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
