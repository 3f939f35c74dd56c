"""Runs the steps of the Containerfile in a new root folder, where no container engine can pull an image.

    apt-get install debootstrap
    python -m benchmarks.containerfile --root /tmp/root --index '' --serve

The root is debootstrap's, of the release that FROM names; RUN, COPY, ENV, USER, WORKDIR and ARG work in it by chroot.
With --serve the ENTRYPOINT with CMD is started in it, and one request is answered. Must be root. The certificates and
the package indexes of this machine are used. A root that exists already is taken as bootstrapped.

Leaves out layers, HEALTHCHECK, VOLUME and everything else that needs a container engine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from aurora_lit.bench.server_process import LOOPBACK, free_port, wait_until_ready

REPOSITORY = Path(__file__).resolve().parents[1]
_MOUNTS = ("/dev", "/dev/shm", "/proc")
_KEY = "key"
_CERTIFICATES = "/opt/certificates.crt"
"""Where the root has this machine's; installing ca-certificates replaces what is in /etc/ssl."""


def steps(text: str) -> Iterator[tuple[str, str]]:
    """(instruction, its argument) of a Containerfile."""
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip():
            name, _, argument = line.strip().partition(" ")
            yield name, argument.strip()


class Root:
    """A folder that is a root file system, and what the Containerfile has set so far."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.user, self.workdir = folder, "root", "/"
        self.environ = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        self.environ |= {name: text for name, text in os.environ.items() if name.startswith("PIP_")}
        self.environ |= dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), _CERTIFICATES)

    def make(self, release: str) -> None:
        """Bootstrap the release, with this machine's resolver, certificates and local wheels."""
        if not self.folder.exists():
            command = ["debootstrap", "--variant=minbase", release, str(self.folder)]
            subprocess.run(command, check=True, stdout=sys.stderr)
        certificates = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
        shutil.copyfile(certificates, self.folder / _CERTIFICATES[1:])
        for path in ("/etc/resolv.conf", "/etc/pip.conf", "/etc/xdg/pip", "/opt/wheels"):
            if Path(path).is_dir():
                shutil.copytree(path, self.folder / path[1:], dirs_exist_ok=True)
            elif Path(path).exists():
                shutil.copyfile(path, self.folder / path[1:])
        for path in _MOUNTS:
            subprocess.run(["mount", "--bind", path, str(self.folder / path[1:])], check=True)

    def close(self) -> None:
        """Undo the mounts."""
        for path in reversed(_MOUNTS):
            subprocess.run(["umount", str(self.folder / path[1:])], check=False)

    def command(self, words: list[str]) -> list[str]:
        """The command line that runs `words` in the root, as the user and in the folder that are set."""
        inside = f'cd {self.workdir} && exec "$@"'
        return ["chroot", f"--userspec={self.user}", str(self.folder), "/bin/sh", "-c", inside, "sh", *words]

    def copy(self, source: str, target: str) -> None:
        """COPY: git's files of the repository, since the work tree may hold more."""
        assert source == "."
        (self.folder / target[1:]).mkdir(exist_ok=True)
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True).stdout
        unpack = ["tar", "-x", "-C", str(self.folder / target[1:])]
        packed = subprocess.run(
            ["tar", "-c", "--null", "-T", "-"], cwd=REPOSITORY, input=listed, capture_output=True, check=True
        )
        subprocess.run(unpack, input=packed.stdout, check=True)


def main() -> None:
    """See the file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="Folder; it is not deleted.")
    parser.add_argument("--index", help="TORCH_INDEX, if it is to differ from the Containerfile's.")
    parser.add_argument("--serve", action="store_true", help="Also start the server and ask it something.")
    options = parser.parse_args()
    root, words = Root(options.root), {"ENTRYPOINT": [], "CMD": []}
    began = time.monotonic()
    try:
        for name, argument in steps((REPOSITORY / "Containerfile").read_text()):
            print(f"{time.monotonic() - began:5.0f} s  {name} {argument}", flush=True)
            if name == "FROM":
                root.make(re.fullmatch(r".*debian:(\w+)-slim", argument)[1])  # type: ignore[index]
            elif name == "RUN":
                command = root.command(["/bin/sh", "-c", argument])
                subprocess.run(command, check=True, env=root.environ, stdout=sys.stderr)
            elif name == "COPY":
                root.copy(*argument.split())
            elif name == "ARG":
                key, _, value = argument.partition("=")
                root.environ[key] = value if options.index is None else options.index
            elif name == "ENV":
                for pair in argument.split():
                    key, _, value = pair.partition("=")
                    root.environ[key] = value.replace("$PATH", root.environ["PATH"])
            elif name == "USER":
                root.user, root.environ["HOME"] = argument, f"/home/{argument}"
            elif name == "WORKDIR":
                root.workdir = argument
            elif name in words:
                words[name] = json.loads(argument)
        if options.serve:
            ask(root, words["ENTRYPOINT"] + words["CMD"])
    finally:
        root.close()


def ask(root: Root, command: list[str]) -> None:
    """Start the server in the root, and print its answer to one request."""
    port = free_port()
    log = root.folder / "server.log"
    with log.open("w") as output:
        words = root.command([*command, f"server.port={port}"])
        environ = root.environ | {"AURORA_LIT_API_KEY": _KEY}
        server = subprocess.Popen(words, env=environ, stdout=output, stderr=output)
        try:
            began = time.monotonic()
            wait_until_ready(f"http://127.0.0.1:{port}/ready", server, log, within_s=600)
            print(f"ready after {time.monotonic() - began:.0f} s")
            body = {"messages": [{"role": "user", "content": "What is the capital of Japan?"}], "temperature": 0}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json", "Authorization": f"Bearer {_KEY}"},
            )
            with LOOPBACK.open(request, timeout=60) as response:
                print(json.load(response)["choices"][0]["message"]["content"])
        finally:
            server.send_signal(signal.SIGTERM)
            print(f"exit code {server.wait(60)}")


if __name__ == "__main__":
    main()
