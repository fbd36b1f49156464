# Common part of the files in this folder. Each sources it and calls one of its functions: train, in_parts, all_at_once.

set -uo pipefail

# >>> modules
# module purge
# module load cuda/12.8
# <<< modules

# The path of the command from 'make install'. Change it to your checkout.
IBQ_SCALE=${IBQ_SCALE:-"$SLURM_SUBMIT_DIR/.venv/bin/ibq-scale"}

# In a container: options of srun (pyxis), or words before the command (apptainer). IBQ_SCALE is a path in the container.
SRUN=() INSIDE=()
# >>> container
# SRUN+=(--container-image=/shared/images/ibq-scale.sqsh --container-mounts=/shared:/shared,/tmp:/tmp)
# INSIDE=(apptainer exec --nv --bind /shared,/tmp /shared/images/ibq-scale.sif)
# <<< container

# The rendezvous is on the first node of the list, this one. The port is free, and differs between attempts.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 20000))
while (: > "/dev/tcp/127.0.0.1/$MASTER_PORT") 2> /dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT
# The other half of the cores is for the data workers.
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK > 1 ? SLURM_CPUS_PER_TASK / 2 : 1))
# Shards are cached on the node's own disk and kept for the next job. Name an NVMe disk if /tmp is not on one.
# export SLURM_TMPDIR=/local/nvme/$USER
# DeepSpeed compiles operators there too. A shared folder would lock all ranks.
export TORCH_EXTENSIONS_DIR=${SLURM_TMPDIR:-/tmp}/torch_extensions_$SLURM_JOB_ID


# >>> environment
# NCCL finds most networks by itself. Settings for the others:
# export NCCL_DEBUG=INFO             # prints its adapters and its transport in the first lines of the log
# export NCCL_IB_HCA=mlx5            # these adapters only, without those for storage and management
# export NCCL_SOCKET_IFNAME=ib0      # the interface of the first handshake, if not the default route
# export GLOO_SOCKET_IFNAME=ib0      # the same for gloo
# export NCCL_IB_GID_INDEX=3         # RoCE: the routable address of the adapter
# export NCCL_NET_GDR_LEVEL=PHB      # GPUDirect for adapters and GPUs on different switches too
# export NCCL_IB_TIMEOUT=22          # large fabrics: a lost packet is an error after 17 s instead of 4
# <<< environment

# A command on all ranks, and a command on this node after their end.
RANKS=(srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 "${SRUN[@]}" "${INSIDE[@]}" "$IBQ_SCALE")
HERE=(srun --overlap --nodes=1 --ntasks=1 --relative=0 "${SRUN[@]}" "${INSIDE[@]}" "$IBQ_SCALE")

# Failed ranks write their tracebacks to a folder with the prefix $1. job-ended and step-ended name the first cause.
collect_failures() {
    export IBQ_SCALE_FAILURES=$1-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    mkdir -p "$IBQ_SCALE_FAILURES" && trap 'rmdir "$IBQ_SCALE_FAILURES" 2> /dev/null' EXIT
}

# train tokenizer|ar WORDS: runs a training, and requeues its job if that helps.
train() {
    # The logs are in the run directory.
    RUN=$(printf '%s\n' "$@" | sed -n 's/^out=//p' | tail -n 1)
    : "${RUN:?give the run directory, out=/shared/runs/NAME}"
    mkdir -p "$RUN/logs"
    exec >> "$RUN/logs/job-$SLURM_JOB_ID.log" 2>&1
    collect_failures "$RUN/logs/failures"
    "${RANKS[@]}" train "$@"
    code=$?

    # job-ended logs the failure and the verdict (RUN/attempts.jsonl: up to 3 attempts without a new step). It prints the verdict,
    # the exit code (srun's may be from a rank killed by srun), and the nodes to leave out, or the jobs of the chain (submit
    # --chain) to drop. A requeue ends this script by SIGTERM. A cancelled job does not return.
    trap '' TERM
    STAYS=()
    [[ $(scontrol show job "$SLURM_JOB_ID") != *Requeue=0* ]] || STAYS=(--stays)
    read -r verdict cause names < <("${HERE[@]}" job-ended "$RUN" --code "$code" --seconds "$SECONDS" --attempts 3 "${STAYS[@]}")
    read -r state already < <(squeue --noheader --jobs="$SLURM_JOB_ID" --format="%T %x")
    if [ "$verdict" = requeue ] && [ "$state" = RUNNING ]; then
        scontrol requeue "$SLURM_JOB_ID"
        if [ -n "$names" ]; then
            scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${already:+$already,}$names"
        fi
    elif [ "$verdict" = end ] && [ -n "$names" ]; then
        scancel --state=PENDING ${names//,/ }
    fi
    exit "${cause:-$code}"
}

# in_parts COMMAND WORDS: runs the command in one job, or a part of its work in each task of an array.
in_parts() {
    collect_failures "$SLURM_SUBMIT_DIR/.failures"
    # Whole shards or batches stay, so a time limit costs those in work only. After ten restarts, one takes longer than a job.
    come_back() {
        [ "${SLURM_RESTART_COUNT:-0}" -ge 10 ] || scontrol requeue "$JOB"
    }
    trap come_back USR1
    # This task of an array only. The last task's job id is also the id of the whole array.
    JOB=$SLURM_JOB_ID PART=()
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
        PART=(--part "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT")
    fi
    "${RANKS[@]}" "$@" "${PART[@]}" &
    wait $!
    code=$?
    # 138 (USR1) is not a failure. The job comes back, or ends at its limit.
    [ "$code" = 138 ] || name_cause
    # A broken node (71) is soon free again and would fail every task. This task moves to another node, up to three times. The
    # requeue ends this script by SIGTERM.
    if [ "$code" = 71 ] && [ "$SLURM_JOB_NUM_NODES" = 1 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
        trap '' TERM
        read -r already < <(squeue --noheader --jobs="$JOB" --format="%x")
        scontrol requeue "$JOB"
        scontrol update JobId="$JOB" ExcNodeList="${already:+$already,}$SLURM_JOB_NODELIST"
    fi
    exit "$code"
}

# all_at_once COMMAND WORDS: runs the command in one job.
all_at_once() {
    collect_failures "$SLURM_SUBMIT_DIR/.failures"
    "${RANKS[@]}" "$@"
    code=$?
    name_cause
    exit "$code"
}

# Logs the failure, and sets code to its cause's. srun's code may be from a rank killed by srun.
name_cause() {
    [ "$code" = 0 ] || read -r cause < <("${HERE[@]}" step-ended --code "$code")
    code=${cause:-$code}
}
