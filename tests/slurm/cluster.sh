#!/usr/bin/env bash
# A toy Slurm cluster on this one machine, for tests, set up as clusters are: accounts are kept (slurmdbd, MariaDB), and
# one must be given; the default partition is short; a job that lost a node begins anew only if it asked for that; a job
# that has ended is soon forgotten.
#
#   cluster.sh start        bring it up; what is up stays up
#   cluster.sh stop         end the daemons that `start` recorded, and nothing else
#   cluster.sh status       print its nodes and jobs; exit 0 when every node answers
#   cluster.sh lose NODE    end a node with all that runs on it, as a power cut does
#   cluster.sh return NODE  start a lost node again; HIDDEN=FOLDER: one that does not see a folder
#
# NODES (2, named toy1, toy2), GPUS (0, fake), CPUS (8) and MEM_MB (16000) describe a node. CPUs and memory are what
# Slurm is told, not what the machine has, and nothing is enforced. Partitions: short (the default, 10 minutes), long (a
# day), cpu (two hours). Accounts: lab; whoever names none gets one that may not submit. Ports are free ones. All state
# is under SLURM_TOY_ROOT, its munge is its own, and a machine with a Slurm configuration of its own is refused, so that
# no real Slurm is disturbed.
set -euo pipefail

root=${SLURM_TOY_ROOT:-${TMPDIR:-/tmp}/lorafusion-slurm}
nodes=${NODES:-2} gpus=${GPUS:-0} cpus=${CPUS:-8} mem_mb=${MEM_MB:-16000}
packages=(slurmctld slurmd slurm-client slurmdbd munge mariadb-server)
export SLURM_CONF=$root/slurm.conf
export MYSQL_UNIX_PORT=$root/db.socket # how slurmdbd finds the database
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

# Each recorded daemon, in the order in which they have to end: the last that came first.
recorded() { ls -t "$root/pids" 2>/dev/null || true; }

answering() { timeout 5 sinfo -h -N -p short -o %T 2>/dev/null | grep -cxE 'idle|mixed|allocated' || true; }

# Every daemon of NODES nodes lives (slurmctld takes minutes to miss one), and every node answers.
healthy() {
    local name
    [ "$(recorded | wc -l)" = $((nodes + 4)) ] || return
    for name in $(recorded); do alive "$name" || return; done
    [ "$(answering)" = "$nodes" ]
}

install_packages() {
    command -v slurmctld slurmd sbatch slurmdbd munged mariadbd >/dev/null && return
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

# The first of `count` free ports, below those that the system hands out itself.
free_ports() {
    local count=$1 first port
    while first=$((20000 + RANDOM % 10000)); do
        for port in $(seq "$first" $((first + count - 1))); do
            if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then continue 2; fi
        done
        echo "$first"
        return
    done
}

write_config() {
    local port
    port=$(free_ports $((nodes + 2))) # node i listens at port + i
    cat >"$root/slurmdbd.conf" <<CONF
DbdHost=localhost
DbdPort=$((port + nodes + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$root/munge.socket
PidFile=$root/pids/slurmdbd
LogFile=$root/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
CONF
    chmod 600 "$root/slurmdbd.conf"
    cat >"$root/slurm.conf" <<CONF
ClusterName=toy
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
# A job that is put back into the queue waits until its old credential has expired.
AuthInfo=socket=$root/munge.socket,cred_expire=10
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
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=$((port + nodes + 1))
AccountingStoragePass=$root/munge.socket
AccountingStorageEnforce=associations,limits
AccountingStoreFlags=job_comment
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
MinJobAge=300
JobRequeue=0
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
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
    cat >>"$root/slurm.conf" <<CONF
PartitionName=short Nodes=toy[1-$nodes] Default=YES MaxTime=00:10:00
PartitionName=long Nodes=toy[1-$nodes] MaxTime=1-00:00:00
PartitionName=cpu Nodes=toy[1-$nodes] MaxTime=02:00:00
CONF
    echo "CgroupPlugin=cgroup/v1" >"$root/cgroup.conf" # else slurmd looks for a version to use, and may find none
}

# until_succeeds SECONDS COMMAND...: wait until a command succeeds.
until_succeeds() {
    local tries=$(($1 * 5))
    shift
    for _ in $(seq "$tries"); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.2
    done
    return 1
}

start_munge() {
    (umask 077 && head -c 1024 /dev/urandom >"$root/munge.key")
    # --force: munged would rather not keep its socket below a directory that all may write to, such as /tmp.
    munged --force --key-file="$root/munge.key" --socket="$root/munge.socket" --pid-file="$root/pids/munged" \
        --log-file="$root/log/munged.log" --seed-file="$root/munge.seed" 2>>"$root/log/munged.log" ||
        fail "munged did not start: see $root/log/munged.log"
}

start_database() {
    local log=$root/log/mariadbd.log
    mariadb-install-db --no-defaults --user=root --datadir="$root/db" --auth-root-authentication-method=normal \
        --skip-test-db --skip-name-resolve >"$log" 2>&1 || fail "no database: see $log"
    # It is thrown away: what a power cut would lose need not be on the disk.
    setsid mariadbd --no-defaults --user=root --datadir="$root/db" --socket="$MYSQL_UNIX_PORT" --skip-networking \
        --pid-file="$root/pids/mariadbd" --innodb-flush-log-at-trx-commit=0 --skip-log-bin \
        </dev/null >>"$log" 2>&1 &
    until_succeeds 30 [ -S "$MYSQL_UNIX_PORT" ] || fail "mariadbd did not start: see $log"
}

# The user's default account is one that may not submit: so clusters are set up where an account must be given.
start_accounting() {
    slurmdbd
    until_succeeds 30 sacctmgr -n show cluster || fail "slurmdbd did not start: see $root/log/slurmdbd.log"
    {
        sacctmgr -i add cluster toy
        sacctmgr -i add account none,lab
        sacctmgr -i modify account none set MaxSubmitJobs=0
        sacctmgr -i add user "$(id -un)" account=none,lab defaultaccount=none
        sacctmgr -i add user nobody account=lab
    } >>"$root/log/sacctmgr.log" || fail "no accounts: see $root/log/sacctmgr.log"
}

start_node() {
    if [ -n "${HIDDEN:-}" ]; then
        # shellcheck disable=SC2016
        unshare --mount sh -c 'mount -t tmpfs none "$1" && exec slurmd -N "$2"' sh "$HIDDEN" "$1"
    else
        slurmd -N "$1"
    fi
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
    mkdir -p "$root"/{pids,log,state,db}
    chmod 755 "$root"
    echo "$settings" >"$root/settings"
    write_config
    ln -sfn "$SLURM_CONF" $link

    start_munge
    start_database
    start_accounting
    slurmctld
    local n
    for n in $(seq "$nodes"); do
        start_node "toy$n"
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
    sinfo -N -p short -o '%N %T %c CPUs %m MB %G'
    squeue -h -o '%i %T %j %k'
    [ "$up" = "$(sinfo -h -N -p short | wc -l)" ] || fail "only $up nodes answer: see $root/log"
}

# All that a node runs: its slurmd, the steps that slurmd started (they write to its log), and what these started.
processes_of() {
    local found next
    found=$(find /proc/[0-9]*/fd -lname "$root/log/slurmd.$1.log" 2>/dev/null | cut -d/ -f3 | sort -u)
    while [ -n "$found" ]; do
        echo "$found"
        next=$(pgrep -P "$(echo "$found" | paste -sd,)") || true
        found=$next
    done
}

lose() {
    alive "slurmd.$1" || fail "$1 is not up"
    processes_of "$1" | xargs kill -KILL 2>/dev/null || true
    scontrol update nodename="$1" state=down reason=lost
}

return_node() {
    alive "slurmd.$1" || start_node "$1"
    until_succeeds 30 is_up "$1" || fail "$1 did not return: $(sinfo -h -N -n "$1" -p short -o '%T %E'); see $root/log/slurmd.$1.log"
}

is_up() { sinfo -h -N -n "$1" -p short -o %T | grep -qxE 'idle|mixed|allocated|completing'; }

case ${1:-}:${2:-} in
start: | stop: | status:) "$1" ;;
lose:?*) lose "$2" ;;
return:?*) return_node "$2" ;;
*) fail "usage: cluster.sh start|stop|status|lose NODE|return NODE" ;;
esac
