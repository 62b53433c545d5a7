"""Two real processes share the caching of latents, in memory and on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from library.data.latent_files import LatentFiles
from library.data.latents import cache_latents, cache_latents_to_disk
from library.data.pictures import scan_datasets
from library.data.settings import DatasetSettings, SubsetSettings
from library.data.team import Team

folder = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
team = Team(accelerator.process_index, accelerator.num_processes, gather_object)
subset = SubsetSettings(image_dir=folder, flip_aug=True)
pictures = scan_datasets([DatasetSettings(resolution=(32, 32), subsets=(subset,))], False, False)
encoded = []

def encode(pixels_BCHW):
    encoded.append(len(pixels_BCHW))
    return pixels_BCHW[:, :, None, ::8, ::8]

in_memory = cache_latents(pictures, encode, 2, team, False)
on_disk = cache_latents_to_disk(pictures, encode, 2, LatentFiles("vae"), False, team, False)
sums = {str(key): in_memory[key].sum().item() for key in in_memory}
same = all(torch.equal(in_memory[key], on_disk[key]) for key in in_memory) and len(in_memory) == len(on_disk)
(folder / f"{team.rank}.json").write_text(json.dumps([sum(encoded), same, sums]))
accelerator.end_training()  # else its threads may abort a process that ends first
"""


def test_each_process_encodes_its_share_and_has_all(tmp_path, draw):
    for index in range(5):
        draw(f"{index}", (32, 32))
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert first[0] + second[0] == 2 * 10 and min(first[0], second[0]) == 2 * 5
    assert first[1] and second[1]
    assert len(first[2]) == 10 and sorted(first[2].items()) == sorted(second[2].items())
