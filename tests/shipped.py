"""The specs that are shipped: recurrences alone, by their text, and layers that attend or use other files, by name."""

from __future__ import annotations

import re
from pathlib import Path

SPECS = Path(__file__).resolve().parent.parent / "specs"
TEXTS = {p.stem: p.read_text() for p in sorted(SPECS.glob("*.spec"))}
RECURRENCES = {n: t for n, t in TEXTS.items() if not re.search(r"^use |^ *attention ", t, re.M)}
ATTENTIONS = sorted(TEXTS.keys() - RECURRENCES)
