#!/bin/bash
# sbatch examples/accelerate_configs/slurm.sh --zoo zoo --tasks tasks.jsonl --behaviour_steps 2000 --output_dir generator
# Trains on all devices of both machines. To collect, start processes that share the tasks of one folder, each on its own:
#     srun --ntasks=16 --gpus-per-task=1 hf-icm-lora collect --output_dir zoo
#SBATCH --job-name=lora-generator
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun bash -c 'accelerate launch --config_file examples/accelerate_configs/two_nodes.yaml \
    --main_process_ip "$0" --machine_rank "$SLURM_NODEID" examples/train_generator.py "$@"' "$head" "$@"
