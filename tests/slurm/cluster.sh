#!/usr/bin/env bash
# A toy Slurm cluster on this one machine, for tests.
#
#   cluster.sh start    bring it up; what is up stays up
#   cluster.sh stop     end the daemons that `start` recorded, and nothing else
#   cluster.sh status   print its nodes and jobs; exit 0 when every node answers
#
# NODES (2), GPUS (0, fake), CPUS (8) and MEM_MB (16000) describe a node. CPUs and memory are what Slurm is
# told, not what the machine has, and nothing is enforced. All state is under SLURM_TOY_ROOT, its munge is its own,
# and a machine with a Slurm configuration of its own is refused, so that no real Slurm is disturbed.
set -euo pipefail

root=${SLURM_TOY_ROOT:-${TMPDIR:-/tmp}/lorafusion-slurm}
nodes=${NODES:-2} gpus=${GPUS:-0} cpus=${CPUS:-8} mem_mb=${MEM_MB:-16000}
port=${SLURM_TOY_PORT:-26817} # the controller's; node i listens at port + i
packages=(slurmctld slurmd slurm-client munge)
export SLURM_CONF=$root/slurm.conf
# Where every other client looks. SLURM_CONF would not do: Snakemake's plugin drops it inside of a job.
link=/etc/slurm/slurm.conf
PATH=$PATH:/usr/sbin:/sbin # where Debian keeps the daemons

fail() {
    echo "cluster.sh: $*" >&2
    exit 1
}

# alive NAME: the recorded process runs and still is that program (its pid may have been given anew).
alive() {
    local pid
    pid=$(cat "$root/pids/$1" 2>/dev/null) &&
        awk -v "name=${1%%.*}" '$1 == "Name:" { same = $2 == name }
            $1 == "State:" { exit !(same && $2 != "Z") }' "/proc/$pid/status" 2>/dev/null
}

# Each recorded daemon, in the order in which they have to end, which is the alphabet's from behind.
recorded() { ls -r "$root/pids" 2>/dev/null || true; }

answering() { timeout 5 sinfo -h -N -o %T 2>/dev/null | grep -cxE 'idle|mixed|allocated' || true; }

# Every daemon of NODES nodes lives (slurmctld takes minutes to miss one), and every node answers.
healthy() {
    local name
    [ "$(recorded | wc -l)" = $((nodes + 2)) ] || return
    for name in $(recorded); do alive "$name" || return; done
    [ "$(answering)" = "$nodes" ]
}

install_packages() {
    command -v slurmctld slurmd sbatch munged >/dev/null && return
    command -v apt-get >/dev/null || fail "Slurm is not installed, and there is no apt-get to install it with"
    echo "installing ${packages[*]}"
    apt-get update -qq
    # The daemons are ours to start: keep the packages from starting them (policy-rc.d is Debian's way to say so).
    local policy=/usr/sbin/policy-rc.d ours=
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && ours=1
    fi
    local status=0
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null || status=$?
    [ -z "$ours" ] || rm -f $policy
    [ $status = 0 ] || fail "apt-get could not install ${packages[*]}"
}

write_config() {
    cat >"$root/slurm.conf" <<CONF
ClusterName=toy
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$root/munge.socket
CredType=cred/munge
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool.%n
SlurmctldPidFile=$root/pids/slurmctld
SlurmdPidFile=$root/pids/slurmd.%n
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd.%n.log
# A container has no cgroups to manage, and the nodes have no CPUs of their own to bind to.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
# Without accounting, squeue is the only witness of a job's end: it must not forget between two polls.
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=0
KillWait=5
CONF
    : >"$root/gres.conf"
    local gres="" n g
    if [ "$gpus" -gt 0 ]; then
        gres="Gres=gpu:$gpus"
        echo "GresTypes=gpu" >>"$root/slurm.conf"
        for n in $(seq "$nodes"); do
            for g in $(seq 0 $((gpus - 1))); do
                ln -s /dev/null "$root/toy$n.gpu$g" # slurmd insists on a device
            done
            echo "NodeName=toy$n Name=gpu File=$root/toy$n.gpu[0-$((gpus - 1))]" >>"$root/gres.conf"
        done
    fi
    for n in $(seq "$nodes"); do
        echo "NodeName=toy$n NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + n))" \
            "CPUs=$cpus RealMemory=$mem_mb $gres State=UNKNOWN" >>"$root/slurm.conf"
    done
    echo "PartitionName=toy Nodes=toy[1-$nodes] Default=YES MaxTime=01:00:00 State=UP" >>"$root/slurm.conf"
    echo "CgroupPlugin=cgroup/v1" >"$root/cgroup.conf" # else slurmd looks for a version to use, and may find none
}

start() {
    [ "$(uname -s)" = Linux ] || fail "needs Linux"
    [ "$(id -u)" = 0 ] || fail "needs root"
    install_packages
    [ ! -e $link ] || [ "$(readlink $link)" = "$SLURM_CONF" ] || fail "this machine has its own $link: left alone"
    local settings="$nodes nodes, $gpus GPUs, $cpus CPUs, $mem_mb MB"
    if [ -n "$(recorded)" ]; then
        if [ "$(cat "$root/settings" 2>/dev/null)" = "$settings" ] && healthy; then
            status
            return
        fi
        stop # half up, or of another shape
    fi
    rm -rf "$root"
    mkdir -p "$root"/{pids,log,state}
    chmod 755 "$root"
    echo "$settings" >"$root/settings"
    write_config
    ln -sfn "$SLURM_CONF" $link

    (umask 077 && head -c 1024 /dev/urandom >"$root/munge.key")
    # --force: munged would rather not keep its socket below a directory that all may write to, such as /tmp.
    munged --force --key-file="$root/munge.key" --socket="$root/munge.socket" --pid-file="$root/pids/munged" \
        --log-file="$root/log/munged.log" --seed-file="$root/munge.seed" 2>>"$root/log/munged.log" ||
        fail "munged did not start: see $root/log/munged.log"
    slurmctld -f "$SLURM_CONF"
    local n
    for n in $(seq "$nodes"); do
        slurmd -N "toy$n" -f "$SLURM_CONF"
    done
    for _ in $(seq 60); do
        healthy && break
        alive slurmctld || fail "slurmctld ended: $(grep -E 'fatal|error' "$root/log/slurmctld.log" | tail -1)"
        sleep 0.5
    done
    status
}

stop() {
    if alive slurmctld; then
        timeout 10 scancel --quiet --state=PENDING --user="$(id -un)" || true
        timeout 10 scancel --quiet --user="$(id -un)" || true
        for _ in $(seq 20); do
            [ -z "$(timeout 5 squeue -h -t running,completing 2>/dev/null)" ] && break
            sleep 0.5
        done
    fi
    local name pid
    for name in $(recorded); do
        if alive "$name"; then
            pid=$(cat "$root/pids/$name")
            kill "$pid"
            for _ in $(seq 25); do
                alive "$name" || break
                sleep 0.2
            done
            # A slurmd that still tries to register does not hear SIGTERM.
            if alive "$name"; then kill -KILL "$pid"; fi
            echo "ended $name ($pid)"
        fi
        rm -f "$root/pids/$name"
    done
    if [ "$(readlink $link)" = "$SLURM_CONF" ]; then rm -f $link; fi
}

status() {
    local up
    up=$(answering)
    [ "$up" -gt 0 ] || fail "down (logs, if any: $root/log)"
    sinfo -N -o '%N %T %c CPUs %m MB %G'
    squeue -h -o '%i %T %j %k'
    [ "$up" = "$(sinfo -h -N | wc -l)" ] || fail "only $up nodes answer: see $root/log"
}

case ${1:-} in
start | stop | status) "$1" ;;
*) fail "usage: cluster.sh start|stop|status" ;;
esac
