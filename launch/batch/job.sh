# Prints one field of SLURM's description of this job, e.g. `field JobState`.
field() {
    SLURM_TIME_FORMAT=standard scontrol -o show job "$SLURM_JOB_ID" | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1
}

say() { echo "bagualu: $*" >&2; }

# Called when a setup line has failed, or ended the shell, with exit code $1. Ends the job, because other nodes wait for this one. If the
# job was asked to stop, which ends the line with 143, nothing is lost and the exit code is 75.
setup_failed() {
    trap - EXIT
    if [[ -n $asked_to_stop || $1 == 143 ]]; then exit 75; fi
    say "failed: no single rank, setup of node $SLURMD_NODENAME: exit code $1 of \`$setup\`; correct launch.slurm.setup and submit" \
        "the job again (\`|| true\` lets a line fail)"
    trap '' TERM
    scancel --signal=TERM "$SLURM_JOB_ID"
    exit 78
}

# Called when the agent of this node has ended with exit code $1; 143 means that it was asked to stop before it had begun. srun returns
# the highest code of all nodes, also of a node that the run went on without. So the code of the first node's agent is written to a file,
# and counts for the run.
agent_ended() {
    local code=$1
    if [ "$code" = 143 ]; then code=75; fi
    if [ "$SLURM_NODEID" = 0 ]; then
        echo "$code" > "$ended"
    elif [[ -n $no_kill && $code != 0 && $code != 2 && $code != 75 && $code != 76 ]]; then
        end_without_script
    fi
    exit "$code"
}

# With --no-kill, a job that loses its first node, and this script with it, would stay until its time limit. So another node, whose agent
# has failed, checks whether srun still runs. If not, it ends or requeues the job once SLURM knows of the loss.
end_without_script() {
    local try
    for try in {1..90}; do
        if timeout 10 bash -c ": < /dev/tcp/$SLURM_SRUN_COMM_HOST/$SLURM_SRUN_COMM_PORT" 2>/dev/null; then return; fi
        if [ "$(field JobState)" != RUNNING ]; then return; fi
        if ! scontrol show hostnames "$(field NodeList)" | grep -qxF "$first"; then
            if [ "$requeue" = yes ]; then scontrol requeue "$SLURM_JOB_ID"; else scancel "$SLURM_JOB_ID"; fi
            return
        fi
        sleep 10
    done
}
export ended="$logs/.slurm-$SLURM_JOB_ID.ended" first
export -f field say setup_failed agent_ended end_without_script

# Prints the newest checkpoint's step; 0 if there is none.
saved_step() {
    local step
    step=$(grep -s '"what": "saved"' "$ledger" | tail -n 1 | sed -n 's/.*"step": \([0-9]*\).*/\1/p')
    echo "${step:-0}"
}

# Prints the largest value of key $1 in JSON lines, rounded up; nothing if no line has it.
largest() {
    local value
    value=$(sed -n "s/.*\"$1\": \([0-9]*\).*/\1/p" | sort -n | tail -n 1)
    echo "${value:+$((value + 1))}"
}

# Prints how many seconds before its end a job of $1 seconds asks the run to save and stop: twice the measured time of a step and a save,
# plus 15 s. Without a measured save a quarter of the time, at most 5 minutes.
lead() {
    local save step lead=$(($1 / 4 < 300 ? $1 / 4 : 300)) least=$(($1 / 8 < 60 ? $1 / 8 : 60))
    save=$(grep -s '"what": "saved"' "$ledger" | tail -n 5 | largest seconds)
    step=$(tail -n 20 "$metrics" 2>/dev/null | largest step_seconds)
    if [ -n "$save" ]; then lead=$((15 + 2 * (${step:-0} + save))); fi
    if [ "$lead" -lt "$least" ]; then lead=$least; fi
    echo $((lead < $1 / 2 ? lead : $1 / 2))
}

# Look at the job: sets `left` to the seconds until the run must be asked to stop (SLURM may move the job's end), and asks for it if none
# are left. Prints a message when SLURM has taken nodes from the job.
look_at_job() {
    local end nodes
    end=$(field EndTime) left=60
    if [[ $end == [0-9]* ]]; then  # else there is no limit
        end=$(date -d "$end" +%s)
        left=$((end - $(lead $((end - began))) - $(date +%s)))
        if [ "$left" -le 0 ]; then
            say "the job ends in $((end - $(date +%s))) s: the run is asked to save and stop"
            time_is_up=yes ask=yes
        fi
    fi
    nodes=$(field NumNodes)
    if [ "${nodes:-$SLURM_JOB_NUM_NODES}" -lt "$SLURM_JOB_NUM_NODES" ]; then
        say "SLURM has taken nodes from this job, which has $nodes left. A job that runs gets none back, so the run does not" \
            "grow back; to save and go on with all nodes: scancel --batch --signal=USR1 $SLURM_JOB_ID"
        SLURM_JOB_NUM_NODES=$nodes
    fi
}

# Ask the agents to stop. Not through srun, which kills its tasks when it gets SIGTERM. If SLURM itself ends the job, it has already
# asked them.
ask_to_stop() {
    if [ "$(field JobState)" = RUNNING ]; then scancel --signal=TERM "$SLURM_JOB_ID"; fi
}

rm -f "$ended"
began=$(date +%s)
step=$(saved_step)
time_is_up=no ask=no
trap 'time_is_up=yes ask=yes' USR1  # bash 5.2 may wait forever for a command that a trap has started: they only set variables
trap ask=yes TERM

# srun inherits neither all variables (--export=NONE in the header) nor, since SLURM 22.05, the cores of a task.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    --kill-on-bad-exit=0 $no_kill bash -c agent &
agents=$!
left=0 next_look=$SECONDS
while kill -0 "$agents" 2>/dev/null; do
    if [[ $time_is_up == no && $SECONDS -ge $next_look ]]; then
        look_at_job
        next_look=$((SECONDS + (left < 60 ? left : 60)))
    fi
    if [ "$ask" = yes ]; then
        ask=no
        ask_to_stop
    fi
    sleep 5 &
    wait -n "$agents" $!  # or until a signal comes
    kill $! 2>/dev/null
done
wait "$agents"
code=$?
if [ -s "$ended" ] && [ "$code" != 78 ]; then code=$(<"$ended"); fi
rm -f "$ended"

# Exit code 75: stopped with nothing lost; 143: before the agents had begun. A job that is preempted, or whose time is up, goes back into
# the queue. A cancelled job does not.
if [ "$requeue" = yes ] && [[ $code == 75 || $code == 143 ]]; then
    preempted=$(field PreemptTime)
    if [[ $preempted == [0-9]* ]]; then
        say "preempted: back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    elif [[ $(field JobState) == RUNNING && $time_is_up == yes || $(field Reason) == TimeLimit ]]; then
        if [ "$(saved_step)" -gt "$step" ]; then
            scontrol requeue "$SLURM_JOB_ID"
        else
            say "failed: no single rank, time limit: the job has gained no step in $(($(date +%s) - began)) s and would gain none" \
                "when it is put back into the queue; give a longer launch.slurm.time, then go on with checkpoint.resume=true"
            code=76
        fi
    fi
fi
exit "$code"
