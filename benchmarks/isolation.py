"""Runs programs that nobody has read: without network, without this machine's files, for a limited time.

    check_isolation()                                    AuroraError: it cannot be had here, and why
    run_isolated("print(6 * 7)", seconds=10).output      "42\\n"

A program has namespaces of its own (Linux: mounts, network, processes, IPC). Its root holds nothing but the system's
libraries and Python, read-only, and an empty folder in memory that is its working directory and home. It runs as
`nobody`, or, if this process is not root's, as the only user of a user namespace; without capabilities in any case.
Processor time, memory, the size of files and the number of processes are limited. At the end all its processes die.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from typing import NamedTuple

from aurora_lit.errors import AuroraError

_MB = 1 << 20
_VISIBLE = ("/usr", "/bin", "/sbin", "/lib", "/lib64")
_LIMITS = (f"--as={1024 * _MB}", f"--fsize={16 * _MB}", "--nproc=1", "--nofile=64", "--core=0")
_SETUP = """
set -eu
root=$1; shift
mount -t tmpfs -o size=64m,mode=755,nosuid,nodev isolated "$root"
while [ "$1" != -- ]; do
  mkdir -p "$(dirname "$root$1")"
  if [ -L "$1" ]; then cp -P "$1" "$root$1"; elif [ -d "$1" ]; then
    mkdir -p "$root$1"
    mount --rbind "$1" "$root$1"
    mount -o remount,bind,ro,nosuid,nodev "$root$1"
  fi
  shift
done
shift
mkdir "$root/old" "$root/proc" && mkdir -m 777 "$root/scratch"
mount -t proc proc "$root/proc"
cat > "$root/program.py"
cd "$root"
pivot_root . old
umount -l /old
cd /scratch
"$@" || exit $?
"""
"""Run by the namespaces' first process, which stays: when it is killed, so are all others. $1: where the root will be;
then the folders that are seen, "--", and the command. The program comes by standard input."""
_PROBE = """
import mmap, os, socket

def attempt(what, action):
    try:
        action()
    except (OSError, MemoryError):
        return
    print(what)

def fork():
    if not os.fork():
        os._exit(0)

attempt("reach the network", lambda: socket.create_connection(("127.0.0.1", {port}), 1))
attempt("read files of this machine", lambda: os.stat({secret!r}))
attempt("write outside its folder", lambda: open("/usr/isolation-probe", "w"))
attempt("write large files", lambda: os.truncate(open("/scratch/large", "w").fileno(), 1 << 30))
attempt("take 4 GB of memory", lambda: mmap.mmap(-1, 4 << 30))
attempt("start processes", fork)
attempt("use root's capabilities", lambda: os.chroot("/scratch"))
print("done")
"""


class Ended(NamedTuple):
    """What became of a program."""

    code: int
    """Its exit code; 137 if it was killed for its time."""
    output: str
    errors: str


def run_isolated(program: str, *, seconds: int) -> Ended:
    """Run a Python program with so many seconds of processor time, and six times as many in all."""
    root = os.geteuid() == 0
    user = ["--reuid=65534", "--regid=65534", "--clear-groups"] if root else []
    command = ["unshare", "--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child"]
    command += [] if root else ["--user", "--map-root-user"]
    command += ["sh", "-c", _SETUP, "sh"]
    rights = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    limited = ["setpriv", *user, *rights, "prlimit", f"--cpu={seconds}", *_LIMITS]
    python = [sys._base_executable, "-I", "/program.py"]  # type: ignore[attr-defined]
    environment = {"PATH": "/usr/bin:/usr/sbin:/bin:/sbin", "HOME": "/scratch", "LANG": "C.UTF-8"}
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
    ):
        try:
            code = subprocess.run(
                [*command, folder, *_VISIBLE, sys.base_prefix, "--", *limited, *python],
                input=program.encode(errors="replace"),
                stdout=output,
                stderr=errors,
                env=environment,
                timeout=6 * seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            code = 137
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Ended(code, *texts)


def check_isolation() -> None:
    """Raise AuroraError if a program could do here what it must not, or cannot be run."""
    with tempfile.NamedTemporaryFile() as secret, socket.create_server(("127.0.0.1", 0)) as server:
        probe = _PROBE.format(port=server.getsockname()[1], secret=secret.name)
        try:
            ended = run_isolated(probe, seconds=10)
        except OSError as error:
            raise AuroraError(
                f"programs cannot be isolated here: {error}; util-linux has unshare and setpriv"
            ) from error
    *possible, last = ended.output.splitlines() or [""]
    if last != "done":
        raise AuroraError(f"programs cannot be isolated here: {ended.errors.strip() or f'exit code {ended.code}'}")
    if possible:
        raise AuroraError(f"programs are not isolated here: one could {', '.join(possible)}")
