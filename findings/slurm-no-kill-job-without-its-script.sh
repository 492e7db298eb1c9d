#!/bin/bash
# SLURM 22.05.8 (Debian 12: slurm-wlm 22.05.8-4+deb12u3), as root.
#
# sbatch --no-kill: "Do not automatically terminate a job if one of the nodes it has been allocated fails."
# Expected: when the failed node is the first, which runs the batch script, the job ends or is requeued (it has --requeue): nothing is
#   left that could go on, requeue it, or end it.
# Instead: the job stays RUNNING on the other nodes, without its script and without a step, until its time limit, and keeps those
#   nodes from everybody; the returned first node does not change that. Without --no-kill the same job is requeued at once.
#
# Seen:
#   with --no-kill:    RUNNING restarts=0 nodes=n2 processes=0
#   without --no-kill: PENDING restarts=1 nodes= processes=0
#
# Bagualu asks for --no-kill with restart.elastic=true; launch/batch/job.sh (end_without_script) ends such a job from another node
# (tests/launch/batch/test_job.py, tests/launch/verbs/test_slurm.py).
set -u
VERSION=22.05.8-4+deb12u3
if ! command -v slurmctld > /dev/null; then
    apt-get update -q > /dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -qy "slurm-wlm=$VERSION" > /dev/null
fi
work=$(mktemp -d)
mkdir "$work/state"
port=$((20000 + RANDOM % 20000))
cat > "$work/slurm.conf" <<END
ClusterName=finding
SlurmctldHost=localhost
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool-%n
SlurmctldPort=$port
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 1))
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 2))
PartitionName=main Nodes=ALL Default=YES State=UP
END
export SLURM_CONF=$work/slurm.conf
slurmctld -D 2> /dev/null & controller=$!
slurmd -D -N n1 2> /dev/null & first=$!
slurmd -D -N n2 2> /dev/null & second=$!
trap 'for job in $(squeue -h -o %A); do scancel "$job"; done; sleep 2; kill "$first" "$second" "$controller"; sleep 2; rm -rf "$work"' EXIT
disown -a
until sinfo -h -t idle -o %D 2> /dev/null | grep -q 2; do sleep 0.5; done

field() { scontrol -o show job "$1" | tr ' ' '\n' | sed -n "s/^$2=//p" | head -n 1; }

processes() {  # of job $1 on node $2, by the variables that SLURM gives them
    local file
    for file in $(grep -lzsx "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ); do
        if grep -qzsx "SLURM_JOB_ID=$1" "$file" && grep -qzsx "SLURMD_NODENAME=$2" "$file"; then echo "$file" | cut -d/ -f3; fi
    done
}

# What becomes of a job, submitted with option $1, whose first node is lost with all that ran there.
lose_first_node() {
    local job lost
    job=$(sbatch --parsable --nodes=2 --exclusive --requeue --output="$work/log" $1 --wrap 'srun --no-kill sleep 20')
    until [ "$(field "$job" JobState)" = RUNNING ] && [ -n "$(processes "$job" n2)" ]; do sleep 0.5; done
    sleep 2
    kill -9 "$first"
    lost=$(processes "$job" n1)
    for process in $lost; do lost+=" $(cut -d' ' -f4 "/proc/$process/stat")"; done  # slurmstepd
    kill -9 $(for process in $lost; do if [ "$process" != 1 ]; then echo "$process"; fi; done) 2> /dev/null
    scontrol update nodename=n1 state=down reason=lost
    sleep 5
    slurmd -D -N n1 2> /dev/null & first=$!
    disown "$first"
    until ! scontrol show node n1 | grep -q DOWN; do sleep 0.5; done
    sleep 60
    found="$(field "$job" JobState) restarts=$(field "$job" Restarts) nodes=$(field "$job" NodeList) processes=$(processes "$job" n2 | wc -l)"
    scancel "$job"
    sleep 2
}

lose_first_node --no-kill
with=$found
lose_first_node ""
echo "with --no-kill:    $with"
echo "without --no-kill: $found"
[[ $with == "RUNNING restarts=0 nodes=n2 processes=0" && $found == *"restarts=1"* ]]
