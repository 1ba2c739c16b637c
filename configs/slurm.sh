#!/bin/bash
# sbatch configs/slurm.sh train_instruct_pix2pix.py --output_dir=/shared/run ...
# Tested with stand-ins for Slurm's commands (tests/test_configs.py), not on a cluster.
#SBATCH --job-name=instruct-pix2pix
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
# Slurm sends SIGTERM to this script 300 seconds before the time limit. It is passed on, so that the run writes a
# checkpoint; then the job is queued again, and resumes.
if [ $# -eq 0 ]; then
    echo "error: give the training script and its flags: sbatch configs/slurm.sh train_instruct_pix2pix.py ..." >&2
    exit 2
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280 # seconds until the launcher kills; its default of 30 is too short
export NODES=$SLURM_NNODES PROCESSES=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-8}))
MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_ADDRESS

stopped=
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
srun --kill-on-bad-exit=0 bash -c 'exec accelerate launch --config_file configs/multi_node.yaml --num_machines "$NODES" \
    --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" "$@"' \
    launch "$@" --resume_from_checkpoint=latest &
steps=$!
wait "$steps"
code=$?
if [ "$stopped" ]; then
    wait "$steps" # the first wait ended with the signal
    code=$?
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
