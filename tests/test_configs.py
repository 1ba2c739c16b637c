"""The files in configs/ are read by accelerate and bash."""

import os
import signal
import subprocess
import time

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.runs import REPOSITORY
from utils.errors import InputError
from utils.runtime import MachineOptions, start_accelerator

CONFIGS = REPOSITORY / "configs"


@pytest.mark.parametrize(
    ("name", "kind", "machines"),
    [
        ("one_gpu", "NO", 1),
        ("multi_gpu", "MULTI_GPU", 1),
        ("multi_node", "MULTI_GPU", 2),
        ("fsdp2", "FSDP", 1),
        ("deepspeed_zero2", "DEEPSPEED", 1),
        ("deepspeed_zero3", "DEEPSPEED", 1),
    ],
)
def test_accelerate_reads_the_configuration(name, kind, machines):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == kind and config.num_machines == machines and config.mixed_precision == "bf16"


def test_every_configuration_is_tested():
    tested = {"one_gpu", "multi_gpu", "multi_node", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == tested


def test_the_slurm_script_is_valid_and_refuses_to_start_nothing():
    script = str(CONFIGS / "slurm.sh")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    finished = subprocess.run(["bash", script], capture_output=True, text=True)
    assert finished.returncode == 2 and finished.stderr.startswith("error: give the training script")


STAND_INS = {
    "srun": 'echo $$ > "$RECORD/srun.pid"\nshift\nSLURM_NODEID=0 exec "$@"',
    "accelerate": 'echo "$@" > "$RECORD/arguments"\ntrap "echo saved > $RECORD/checkpoint; exit 143" TERM\n'
    'echo ready > "$RECORD/ready"\nfor _ in $(seq 1000); do sleep 0.05; done',
    "scontrol": 'if [ "$1" = show ]; then echo node-a; echo node-b; else echo "$@" > "$RECORD/requeued"; fi',
    "scancel": 'echo "$@" > "$RECORD/cancelled"\nkill -TERM "$(cat "$RECORD/srun.pid")"',
}


def test_a_slurm_job_that_runs_out_of_time_saves_and_is_queued_again(tmp_path):
    """With stand-ins for Slurm's commands and the launcher: the signal arrives, is waited for, and the job goes on."""
    for name, text in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    slurm = dict(SLURM_NNODES="2", SLURM_GPUS_ON_NODE="4", SLURM_JOB_NODELIST="node-[a-b]", SLURM_JOB_ID="7")
    env = os.environ | slurm | {"RECORD": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", "configs/slurm.sh", "train_instruct_pix2pix.py", "--output_dir=a b"]
    job = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=subprocess.DEVNULL)
    while not (tmp_path / "ready").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 143
    assert (tmp_path / "checkpoint").read_text() == "saved\n"
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert (tmp_path / "cancelled").read_text() == "--signal=TERM 7\n"
    arguments = (tmp_path / "arguments").read_text()
    assert "--num_machines 2 --num_processes 8 --machine_rank 0 --main_process_ip node-a" in arguments
    assert arguments.endswith("train_instruct_pix2pix.py --output_dir=a b --resume_from_checkpoint=latest\n")


def test_megatron_is_refused_also_where_accelerate_would_ignore_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(InputError, match="(?i)accelerate is set to .*, which this script does not support"):
        start_accelerator(MachineOptions())
