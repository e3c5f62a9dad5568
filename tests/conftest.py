"""What every test needs: the repository root on the path, one OpenMP thread (threads that wait slow tiny matmuls)."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
