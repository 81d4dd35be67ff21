"""A real Slurm on this machine, for tests: munge, slurmctld and two slurmd of its own, on loopback, out of one directory.

Needs Debian's packages slurm-wlm and munge (`.ci/install-slurm`), no systemd, and no settings of the machine. The nodes
have two pretended GPUs each. There is no accounting: `sacct` fails, as it does on many small clusters.

    with Cluster(Path("/tmp/c")) as cluster:     # short: Unix sockets allow 108 characters
        subprocess.run(["sinfo"], env=os.environ | cluster.env)
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
N_NODES, N_CPUS, N_GPUS = 2, 8, 2
# The nodes are *called* by addresses, because a job's MASTER_ADDR is the name of its first node, and it must resolve.
NODES = tuple(f"127.0.0.{i + 1}" for i in range(N_NODES))

CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
# A requeued job may not start again before its credential expires: 120 s by default. A node that stood still for longer
# than that refuses the job.
AuthType=auth/munge
AuthInfo=socket={dpath}/munge.sock,cred_expire=10
MessageTimeout=60
BatchStartTimeout=120
# Listen on what the host name resolves to, not on all interfaces.
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={dpath}/state
SlurmdSpoolDir={dpath}/spool-%n
SlurmctldPidFile={dpath}/slurmctld.pid
SlurmdPidFile={dpath}/slurmd-%n.pid
SlurmctldLogFile={dpath}/slurmctld.log
SlurmdLogFile={dpath}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
# More CPUs and nodes than there are.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
# SIGTERM to SIGKILL: time for ranks to leave on a machine that has much to do. The scheduler looks often, for tests.
# Finished jobs are remembered all day.
KillWait=60
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
MinJobAge=86400
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=off
"""


def missing() -> str:
    """Why there can be no cluster here, or ""."""
    programs = [name for name in DAEMONS + COMMANDS if not _which(name)]
    if programs:
        return f"no {', '.join(programs)} here: `.ci/install-slurm` as root installs slurm-wlm and munge"
    if not _on_loopback() and os.geteuid() != 0:
        return f"the host name {socket.gethostname()} does not resolve to 127.*, and only root can mend that for the daemons"
    return ""


class Cluster:
    """The daemons, from entering to leaving.

    Args:
        dpath: directory to make, with a short path.
    """

    def __init__(self, dpath: Path) -> None:
        self.dpath = dpath
        self.env = {"SLURM_CONF": str(dpath / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        self.dpath.mkdir(parents=True)
        port, host = _free_ports(1 + N_NODES), socket.gethostname() if _on_loopback() else "localhost"
        lines = [CONF.format(dpath=self.dpath, host=host, port=port, user=_user(), first_job=int(time.time()) % 10**6 * 10 + 1)]
        for i, name in enumerate(NODES):
            (self.dpath / f"spool-{name}").mkdir()
            lines.append(
                f"NodeName={name} NodeAddr=127.0.0.1 Port={port + 1 + i} CPUs={N_CPUS} RealMemory=8000 Gres=gpu:{N_GPUS}"
            )
        (self.dpath / "state").mkdir()
        (self.dpath / "slurm.conf").write_text("\n".join(lines) + "\n")
        # slurmd loads a cgroup plugin even where none is used; v2 would want systemd.
        (self.dpath / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for i in range(N_GPUS):  # a pretended GPU must be a character device
            (self.dpath / f"gpu{i}").symlink_to("/dev/null")
        (self.dpath / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.dpath}/gpu[0-{N_GPUS - 1}]\n")
        key_fpath = self.dpath / "munge.key"
        key_fpath.touch(0o600)
        key_fpath.write_bytes(os.urandom(128))
        try:
            self._start(
                "munged",
                "--foreground",
                *(
                    f"--{name}={self.dpath}/munge.{name.removesuffix('-file')}"
                    for name in ("key-file", "pid-file", "seed-file")
                ),
                f"--socket={self.dpath}/munge.sock",
            )
            self._until(lambda: (self.dpath / "munge.sock").exists(), 60, "munged")
            self._start("slurmctld", "-D")
            for name in NODES:
                self._start("slurmd", "-D", "-N", name)
            self._until(
                lambda: self.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == ["idle"] * N_NODES, 120, "nodes"
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # Jobs first: what runs them outlives slurmd.
        if len(self._daemons) > 1:
            self.ask("scancel", "--quiet", "--full", "--signal=KILL", f"--user={_user()}")
            self.ask("scancel", "--quiet", f"--user={_user()}")
            self._until(lambda: not self.ask("squeue", "-h"), 30, "jobs to end", strict=False)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.dpath, ignore_errors=True)

    def ask(self, *command: str) -> str:
        """Standard output of one of Slurm's commands, "" if it fails."""
        return subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True).stdout

    def _start(self, name: str, *args: str) -> None:
        command = [_which(name), *args]
        if not _on_loopback():
            command = ["unshare", "--uts", "sh", "-c", 'hostname localhost && exec "$@"', "sh", *command]
        with open(self.dpath / f"{name}-{len(self._daemons)}.out", "wb") as out:
            self._daemons.append(
                subprocess.Popen(
                    command, env=os.environ | self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
            )

    def _until(self, ready: Callable[[], bool], timeout_s: float, what: str, *, strict: bool = True) -> None:
        until = time.monotonic() + timeout_s
        while not ready():
            if time.monotonic() > until:
                logs = "\n".join(f"{fpath.name}: {fpath.read_text()[-1000:]}" for fpath in self.dpath.glob("*.out"))
                assert not strict, f"waited {timeout_s} s for {what}\n{logs}"
                return
            time.sleep(0.05)


def _which(name: str) -> str:
    return shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin") or ""


def _user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()


def _on_loopback() -> bool:
    """Whether the host name leads back here: the daemons bind to what it resolves to."""
    try:
        return socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        return False


def _free_ports(n: int) -> int:
    """First of `n` free ports below 20,000, where submitit puts no rendezvous."""
    while True:
        first = random.randrange(11_000, 19_000)
        try:
            for port in range(first, first + n):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
