"""What every test needs: the repository root on the path, and one thread of OpenMP.

Matmuls of the tiny policy are so small that threads which wait for each other slow them down.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
