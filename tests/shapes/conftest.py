"""Makes `shapes` importable: the tests and the processes that they start read the same modules."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
