"""The configurations and the script under recipes/accelerate say to Accelerate what they promise."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from distill.main import main
from students import load_student
from support import ROOT, TINY, places

CONFIGS = ROOT / "recipes" / "accelerate"

SRUN = """[[ $* == *--cpus-per-task=64* ]] || exit 9
while [[ $1 == -* ]]; do shift; done
for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done"""


@pytest.mark.parametrize(
    ("name", "machines", "processes", "kind"),
    [("one_gpu", 1, 1, "NO"), ("eight_gpus", 1, 8, "MULTI_GPU"), ("four_machines", 4, 32, "MULTI_GPU")],
)
def test_configs(name: str, machines: int, processes: int, kind: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes, config.distributed_type) == (machines, processes, kind)
    assert config.mixed_precision == "no"  # which leaves it to the recipe


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
    ],
)
def test_what_divides_models_is_refused_before_anything_is_done(
    variable: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `accelerate launch` says it where Accelerate's default config does."""
    monkeypatch.setenv(variable, "true")
    assert main(["recipe=quickstart", f"run_dir={tmp_path / 'run'}", f"cache.dir={tmp_path / 'cache'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"distill.py: accelerate launch brings {name}, which divides models")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0, 0.9])
def test_a_launcher_that_compiles_leaves_a_student_like_others(
    ema: float, finished_run: Path, scene_tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch --dynamo_backend eager`: also from its checkpoints, and of averaged weights."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    images, _, cache = places(finished_run, scene_tar)
    given = [*TINY, images, cache, "train.workers=0", f"train.ema={ema}", "train.checkpoint_every=4"]
    run = tmp_path / "run"
    assert main([*given, "stage=train", f"run_dir={run}"]) == 0
    first = load_student(run / "student.safetensors")
    (run / "student.safetensors").unlink()  # as if it had been killed before the end
    assert main([*given, "stage=train", f"run_dir={run}"]) == 0
    second = load_student(run / "student.safetensors")
    assert not any("_orig_mod" in name for name in first.state_dict())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_the_slurm_script_starts_every_machine_with_its_own_rank(tmp_path: Path) -> None:
    """With stand-ins for what only a cluster has: `srun` runs the command once for each of two machines."""
    for name, script in {
        "scontrol": "echo gpu07; echo gpu08",
        "srun": SRUN,
        "accelerate": 'printf "%s|" "$@"; echo',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NNODES": "2"}
    environment["SLURM_CPUS_PER_TASK"] = "64"  # srun would not take it from sbatch by itself
    command = [str(CONFIGS / "slurm.sh"), "recipe=repvit_m2_3", "data.images=/data/sa 1b/*.tar"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.rstrip("|").split("|") for line in result.stdout.splitlines()]
    assert [line[line.index("--machine_rank") + 1] for line in lines] == ["0", "1"]
    for line in lines:
        assert line[:3] == ["launch", "--config_file", "recipes/accelerate/four_machines.yaml"]
        assert line[line.index("--num_processes") + 1] == "16"
        assert line[line.index("--main_process_ip") + 1] == "gpu07"
        assert line[-3:] == ["distill.py", "recipe=repvit_m2_3", "data.images=/data/sa 1b/*.tar"]
