# What the files of this folder have in common: they source it, and end with a call of one of its three functions.

set -uo pipefail

# >>> modules
# module purge
# module load cuda/12.8
# <<< modules

# Where 'make install' put the command; change it to your checkout.
IBQ_SCALE=${IBQ_SCALE:-"$SLURM_SUBMIT_DIR/.venv/bin/ibq-scale"}

# In a container: options of srun (pyxis), or words before the command (apptainer). IBQ_SCALE is the path in there.
SRUN=() INSIDE=()
# >>> container
# SRUN+=(--container-image=/shared/images/ibq-scale.sqsh --container-mounts=/shared:/shared,/tmp:/tmp)
# INSIDE=(apptainer exec --nv --bind /shared,/tmp /shared/images/ibq-scale.sif)
# <<< container

# All ranks meet at the first node of the list, which is this one; the port is this attempt's own, and nobody listens there.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 20000))
while (: > "/dev/tcp/127.0.0.1/$MASTER_PORT") 2> /dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT
# Half of the cores are for the data workers.
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK > 1 ? SLURM_CPUS_PER_TASK / 2 : 1))
# Shards are cached on the node's own disk, and kept there for the next job: name an NVMe disk, if /tmp is none.
# export SLURM_TMPDIR=/local/nvme/$USER
# Operators that DeepSpeed compiles go there too: a shared folder would lock for all ranks.
export TORCH_EXTENSIONS_DIR=${SLURM_TMPDIR:-/tmp}/torch_extensions_$SLURM_JOB_ID


# >>> environment
# NCCL finds most networks by itself. What to set where it does not:
# export NCCL_DEBUG=INFO             # says which adapters and which transport it took, in the first lines of the log
# export NCCL_IB_HCA=mlx5            # only these adapters: storage and management ones would be taken for fast too
# export NCCL_SOCKET_IFNAME=ib0      # the interface of the first handshake, where the default route leads elsewhere
# export GLOO_SOCKET_IFNAME=ib0      # the same for what goes through gloo
# export NCCL_IB_GID_INDEX=3         # RoCE: the routable address of the adapter
# export NCCL_NET_GDR_LEVEL=PHB      # GPUDirect also where adapter and GPU are not on one switch
# export NCCL_IB_TIMEOUT=22          # large fabrics: 17 s instead of 4 until a lost packet is an error
# <<< environment

# On all ranks; and, when these have ended, on this node only.
RANKS=(srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 "${SRUN[@]}" "${INSIDE[@]}" "$IBQ_SCALE")
HERE=(srun --overlap --nodes=1 --ntasks=1 --relative=0 "${SRUN[@]}" "${INSIDE[@]}" "$IBQ_SCALE")

# Ranks that fail leave their tracebacks in a folder that begins with $1. job-ended and step-ended name the first cause.
collect_failures() {
    export IBQ_SCALE_FAILURES=$1-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    mkdir -p "$IBQ_SCALE_FAILURES" && trap 'rmdir "$IBQ_SCALE_FAILURES" 2> /dev/null' EXIT
}

# train tokenizer|ar WORDS: a run, and whether its job comes back.
train() {
    # The run's own folder holds its logs.
    RUN=$(printf '%s\n' "$@" | sed -n 's/^out=//p' | tail -n 1)
    : "${RUN:?give the run directory, out=/shared/runs/NAME}"
    mkdir -p "$RUN/logs"
    exec >> "$RUN/logs/job-$SLURM_JOB_ID.log" 2>&1
    collect_failures "$RUN/logs/failures"
    "${RANKS[@]}" train "$@"
    code=$?

    # Says in the log what failed and whether the job should come back (RUN/attempts.jsonl: up to 3 attempts without a new
    # step), and here with which exit code (srun's may be that of a rank which it killed), which nodes it should not come back
    # to, or which jobs of its chain (submit --chain) would only meet the same. The requeue ends this script by SIGTERM; one
    # that is cancelled stays away.
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

# in_parts COMMAND WORDS: the job, or each task of an array with its part of the work.
in_parts() {
    collect_failures "$SLURM_SUBMIT_DIR/.failures"
    # What is whole stays, shards or batches: a time limit costs those under way. Ten times, or one takes longer than the job.
    come_back() {
        [ "${SLURM_RESTART_COUNT:-0}" -ge 10 ] || scontrol requeue "$JOB"
    }
    trap come_back USR1
    # Of an array, this task only: the number of the last one is that of the whole array too.
    JOB=$SLURM_JOB_ID PART=()
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
        PART=(--part "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT")
    fi
    "${RANKS[@]}" "$@" "${PART[@]}" &
    wait $!
    code=$?
    # 138, USR1, is no failure: this job comes back, or ends at its limit.
    [ "$code" = 138 ] || name_cause
    # A broken node (71) would swallow one task after the other: this one goes elsewhere, up to three times. The requeue ends
    # this script by SIGTERM.
    if [ "$code" = 71 ] && [ "$SLURM_JOB_NUM_NODES" = 1 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
        trap '' TERM
        read -r already < <(squeue --noheader --jobs="$JOB" --format="%x")
        scontrol requeue "$JOB"
        scontrol update JobId="$JOB" ExcNodeList="${already:+$already,}$SLURM_JOB_NODELIST"
    fi
    exit "$code"
}

# all_at_once COMMAND WORDS: the job does all of it.
all_at_once() {
    collect_failures "$SLURM_SUBMIT_DIR/.failures"
    "${RANKS[@]}" "$@"
    code=$?
    name_cause
    exit "$code"
}

# Says in the log what failed. srun's code may be that of a rank which it killed.
name_cause() {
    [ "$code" = 0 ] || read -r cause < <("${HERE[@]}" step-ended --code "$code")
    code=${cause:-$code}
}
