#!/usr/bin/env bash
# Start a real Slurm cluster of two nodes on this machine, for tests, from Debian's packages. Needs root.
#
#   bash tests/slurm/cluster.sh install          installs missing packages; prints the reason and exits with 3 if it cannot
#   bash tests/slurm/cluster.sh serve FOLDER     starts the cluster, prints "ready", and stops it when standard input closes
#   bash tests/slurm/cluster.sh in FOLDER CMD…   runs a command (sbatch, squeue …) as if on the login node
#
# The controller and both nodes have their own networks, host names and /etc/hosts. A bridge joins the networks, so that a
# rendezvous crosses a network. Only FOLDER and these namespaces change. Their names contain FOLDER's (letters, digits,
# hyphens), so that clusters do not collide. Standard input ends the cluster because it closes however the caller dies.
set -euo pipefail

refuse() {
    echo "$*" >&2
    exit 3
}

install() {
    [ "$(id -u)" = 0 ] || refuse "Slurm's daemons need root"
    local wanted=()
    command -v slurmctld >/dev/null || wanted+=(slurmctld)
    command -v slurmd >/dev/null || wanted+=(slurmd)
    command -v sbatch >/dev/null || wanted+=(slurm-client)
    command -v munged >/dev/null || wanted+=(munge)
    command -v ip >/dev/null || wanted+=(iproute2)
    if [ ${#wanted[@]} -gt 0 ]; then
        command -v apt-get >/dev/null || refuse "no ${wanted[*]}, and no apt-get to install them"
        export DEBIAN_FRONTEND=noninteractive
        if ! apt-get install -y --no-install-recommends "${wanted[@]}" >/dev/null 2>&1; then
            apt-get update >/dev/null 2>&1 || true
            apt-get install -y --no-install-recommends "${wanted[@]}" >/dev/null 2>&1 || refuse "apt-get cannot install ${wanted[*]}"
        fi
    fi
    local probe="evomoe-probe-$$"
    ip netns add "$probe" 2>/dev/null || refuse "network namespaces cannot be made here"
    ip netns delete "$probe"
}

configure() {
    local folder="$1" name="$2" tracking=proctrack/pgid
    # Real clusters track processes with cgroups, and a signal reaches only a task's first process. Only cgroup version 1 is
    # used, because Debian's Slurm needs systemd for version 2. Without it, process groups behave most similarly, because
    # torchrun's workers have groups of their own.
    if mkdir "/sys/fs/cgroup/freezer/probe-$$" 2>/dev/null; then
        rmdir "/sys/fs/cgroup/freezer/probe-$$"
        tracking=proctrack/cgroup
    fi
    mkdir -p "$folder/state" "$folder/log"
    printf '%s\n' "127.0.0.1 localhost" "10.77.0.1 $name-ctl" "10.77.0.11 $name-n1" "10.77.0.12 $name-n2" > "$folder/hosts"
    cat > "$folder/cgroup.conf" <<CONF
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
CONF
    # cred_expire is short because a requeued job waits that long. KillWait is long because saving is slow on a busy machine.
    cat > "$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$name-ctl(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd.%n
MailProg=/bin/true
MpiDefault=none
ProctrackType=$tracking
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/linear
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=5
ReturnToService=2
KillWait=120
MinJobAge=86400
JobRequeue=1
NodeName=$name-n1 NodeAddr=10.77.0.11 CPUs=$(nproc) State=UNKNOWN
NodeName=$name-n2 NodeAddr=10.77.0.12 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=$name-n1,$name-n2 Default=YES MaxTime=INFINITE State=UP
CONF
}

# daemon FOLDER HOST CMD…: start a daemon in HOST's namespaces, as a child of this script.
daemon() {
    local folder="$1" host="$2"
    shift 2
    # `ip netns exec` would hide the cgroup mount from slurmd.
    # shellcheck disable=SC2016  # the inner bash expands the variables
    nsenter --net="/run/netns/$host" unshare --mount --uts \
        bash -c 'mount --bind "$1" /etc/hosts; hostname "$2"; shift 2; exec "$@"' daemon "$folder/hosts" "$host" "$@" \
        < /dev/null >> "$folder/log/$host" 2>&1 &
    disown
}

inside() {
    local folder="$1"
    shift
    SLURM_CONF="$folder/slurm.conf" nsenter --net="/run/netns/$(basename "$folder")-ctl" "$@"
}

stop() {
    local name="$1" host group
    for host in "$name-n1" "$name-n2" "$name-ctl"; do
        [ -e "/run/netns/$host" ] || continue
        # Kill every process in the node's network: daemons, steps and what a job left behind.
        while [ -n "$(ip netns pids "$host")" ]; do
            ip netns pids "$host" | xargs --no-run-if-empty kill -KILL 2>/dev/null || true
            sleep 0.1
        done
        ip netns delete "$host"
        for group in /sys/fs/cgroup/*/"slurm_$host"; do
            [ ! -d "$group" ] || find "$group" -depth -type d -exec rmdir {} +
        done
    done
}

serve() {
    local folder="$1" name node number
    name="$(basename "$folder")"
    trap 'stop "$name"' EXIT
    trap 'exit 1' INT TERM HUP
    configure "$folder" "$name"
    export SLURM_CONF="$folder/slurm.conf"
    ip netns add "$name-ctl"
    ip -n "$name-ctl" link set lo up
    ip -n "$name-ctl" link add bridge type bridge
    ip -n "$name-ctl" address add 10.77.0.1/24 dev bridge
    ip -n "$name-ctl" link set bridge up
    for number in 1 2; do
        node="$name-n$number"
        ip netns add "$node"
        ip -n "$node" link set lo up
        ip -n "$name-ctl" link add "to-n$number" type veth peer name eth0 netns "$node"
        ip -n "$name-ctl" link set "to-n$number" master bridge up
        ip -n "$node" address add "10.77.0.1$number/24" dev eth0
        ip -n "$node" link set eth0 up
    done
    # munged gets its own key and socket, so that the machine's munge is not affected.
    (umask 077 && head -c 128 /dev/urandom > "$folder/munge.key")
    daemon "$folder" "$name-ctl" munged --foreground --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
        --pid-file="$folder/munge.pid" --seed-file="$folder/munge.seed" --log-file="$folder/log/munged"
    daemon "$folder" "$name-ctl" slurmctld -D -i -f "$SLURM_CONF"
    for node in "$name-n1" "$name-n2"; do
        mkdir -p "$folder/spool.$node"
        daemon "$folder" "$node" slurmd -D -N "$node" -f "$SLURM_CONF"
    done
    for _ in $(seq 150); do
        if [ "$(inside "$folder" sinfo --noheader --states=idle --format=%D 2>/dev/null)" = 2 ]; then
            echo ready
            cat > /dev/null # wait until standard input closes
            exit 0
        fi
        sleep 0.2
    done
    tail -n 5 "$folder"/log/* >&2
    echo "the nodes did not come up" >&2
    exit 1
}

case "${1:-}" in
install) install ;;
serve) serve "$2" ;;
in) inside "${@:2}" ;;
*) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
esac
