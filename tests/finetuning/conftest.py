"""The shared parts are in `atlas_parts.py`, which this makes importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
