#!/usr/bin/env bash
# Train on several nodes of a SLURM cluster, one task per GPU; the job resumes by itself after preemption and time limits:
#   COCO_PATH=/path/to/coco sbatch --nodes=2 scripts/slurm_train.sh [flags of main.py]
# OUTPUT_DIR has to be on a file system that all nodes see. What sbatch is given on its command line counts.
#SBATCH --job-name=conditional-detr
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the time limit, main.py finishes its step, writes a checkpoint and ends with exit code 75, after
# which this script puts the job back into the queue. Any other exit code ends the job: 130 is that of Ctrl-C.
#SBATCH --signal=USR1@120
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script by sbatch from the folder of main.py}"

srun --kill-on-bad-exit=1 python main.py --resume auto --save_every "${SAVE_EVERY:-500}" \
  --coco_path "${COCO_PATH:-data/coco}" --output_dir "${OUTPUT_DIR:-output/conddetr_r50_epoch50}" "$@"
code=$?
if [ "$code" -eq 75 ]; then
  echo "asked to end: back to the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
