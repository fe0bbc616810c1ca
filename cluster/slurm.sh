#!/usr/bin/env bash
#SBATCH --job-name=dico-ray
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=90
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@600
# A Ray cluster on Slurm's nodes, and one verb on it:  sbatch cluster/slurm.sh train --config run.yaml
# Ten minutes before the time limit, and when the job is preempted, training commits a checkpoint and the job goes back
# into the queue; it continues there. The environment that has dico-ray must be active on all nodes (shared storage).
set -euo pipefail

: "${SLURM_JOB_ID:?run it by sbatch}" "${SLURM_CPUS_PER_TASK:?give sbatch --cpus-per-task}"
port=$((20000 + SLURM_JOB_ID % 20000))
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

# Slurm's nodes are shared in time with other users: only who has the token may use this Ray.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.ray/dico-ray-$SLURM_JOB_ID"
mkdir -p "$HOME/.ray"
(umask 077 && openssl rand -hex 32 > "$RAY_AUTH_TOKEN_PATH")

start() { # NODE ARGUMENTS...: Ray on one node, in the background, until the job ends
    local node=$1
    shift
    # By name: srun of Slurm 22.05 to 23.02 does not take --cpus-per-task over from sbatch, and gives a step one CPU.
    srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --exact --nodelist="$node" \
        ray start --block --disable-usage-stats --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" "$@" &
}

# At the end: the token goes, and the background steps hold this shell back no longer.
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"; jobs -p | xargs -r kill 2> /dev/null || true' EXIT

start "$head" --head --node-ip-address="$address" --port="$port" --include-dashboard=false
until ray health-check --address "$address:$port" > /dev/null 2>&1; do sleep 2; done
for node in "${nodes[@]:1}"; do start "$node" --address="$address:$port"; done

# The verb waits by itself until the nodes have joined (train.start_timeout_s).
RAY_ADDRESS="$address:$port" dico-ray "$@" &
command=$!
asked=0
trap 'asked=1; kill -TERM "$command"' TERM
code=0
wait "$command" || code=$?
if [ "$asked" = 1 ]; then # the signal ended the first wait; the checkpoint ends the second
    code=0
    wait "$command" || code=$?
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
