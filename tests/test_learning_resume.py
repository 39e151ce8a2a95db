import json
import os
import subprocess
import sys
from pathlib import Path


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    script = Path(__file__).parent / "killed.py"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "10"], capture_output=True, text=True, env=env, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert said["kills"] >= 10  # of 20 attempts, most hit a run that was still going
    assert said["steps"] >= 18
