#!/usr/bin/env bash
# sbatch recipes/accelerate/slurm.sh recipe=repvit_m2_3 teacher.checkpoint=... data.images=... [key=value ...]
#
# Four machines of 8 GPUs; `sbatch --nodes=2 ...` takes two. When the job is preempted, and 90 seconds before its time is
# up, SIGTERM makes it save and end. A preempted job is queued again by Slurm and goes on; one whose time was up goes on
# when it is submitted again.
#SBATCH --job-name=sam-distill
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@90
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# $SLURM_NODEID is each machine's own: srun's shell fills it in, not this one.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    exec accelerate launch --config_file recipes/accelerate/four_machines.yaml \
        --num_machines "$SLURM_NNODES" --num_processes "$((8 * SLURM_NNODES))" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$0" distill.py "$@"
' "${hosts%%$'\n'*}" "$@"
