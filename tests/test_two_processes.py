"""What two processes of a run must agree on, in two real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from types import SimpleNamespace
import torch
from accelerate import Accelerator
from anima_train_network import AnimaNetworkTrainer
from library.training.run import RunSettings

accelerator = Accelerator(cpu=True)
trainer = AnimaNetworkTrainer(SimpleNamespace(run=RunSettings()), accelerator)
rank = accelerator.process_index
gradients = [torch.full((2, 3), 1.0 + rank), torch.tensor(10.0 * rank)]
trainer.sum_over_processes(gradients)
seen = [trainer.on_any_process(rank == 1), trainer.on_any_process(False), *(g.unique().tolist() for g in gradients)]
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(seen, file)
"""


def test_a_stop_on_one_process_stops_all_and_gradients_are_summed(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    root = Path(__file__).parents[1]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert seen == [True, False, [3.0], [10.0]]
