"""Reads a Dockerfile as far as ours go, and runs a target without an engine: in overlays of this machine's own root."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
Instruction = tuple[str, str]


@dataclass(frozen=True)
class Stage:
    name: str
    base: str
    instructions: tuple[Instruction, ...]


class Dockerfile:
    def __init__(self, path: Path) -> None:
        text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
        lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
        self.stages: dict[str, Stage] = {}
        for start, (word, rest) in enumerate(lines):
            if word == "FROM":
                base, _, name = rest.split()
                own = [(kind, what) for kind, what in _until_from(lines[start + 1 :])]
                self.stages[name] = Stage(name, base, tuple(own))

    def instructions(self, target: str) -> list[Instruction]:
        """All that make a target, from its outermost base on; `FROM image` first."""
        stage = self.stages[target]
        before = self.instructions(stage.base) if stage.base in self.stages else [("FROM", stage.base)]
        return [*before, *stage.instructions]

    @cached_property
    def needed(self) -> dict[str, list[str]]:
        """By stage, those that it copies from."""
        return {name: re.findall(r"--from=(\S+)", str(self.instructions(name))) for name in self.stages}

    def environment(self, target: str) -> dict[str, str]:
        found: dict[str, str] = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        for kind, what in self.instructions(target):
            if kind == "ENV":
                for word in shlex.split(what):
                    name, _, value = word.partition("=")
                    found[name] = value.replace("$PATH", found["PATH"])
        return found

    def last(self, target: str, kind: str) -> str:
        return [what for word, what in self.instructions(target) if word == kind][-1]

    def command(self, target: str, kind: str) -> list[str]:
        """An ENTRYPOINT, CMD or HEALTHCHECK in its exec form."""
        found: list[str] = json.loads("[" + self.last(target, kind).split("[", 1)[1])
        return found


def _until_from(lines: list[list[str]]) -> Iterator[Instruction]:
    for word, rest in lines:
        if word == "FROM":
            return
        yield word, rest


class Overlay:
    """A root that looks like this machine's, keeps what is written to itself, and hides what a container would not have."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.root = directory, directory / "root"

    def mount(self, source: str) -> str:
        """Shell commands, for a mount namespace of their own."""
        layers = ",".join(f"{name}dir={self.directory}/{name}" for name in ("upper", "work"))
        hidden = "\n".join(
            f"[ ! -d {path} ] || mount -t tmpfs tmpfs {self.root}{path}" for path in ("/home", "/root", "/srv", "/work", "/tmp")
        )
        return f"""
            mkdir -p {self.directory}/upper {self.directory}/work {self.root}
            mount -t overlay overlay -o lowerdir={source},{layers} {self.root}
            {hidden}
            mount --rbind /dev {self.root}/dev
            mount -t proc proc {self.root}/proc
            chmod 1777 {self.root}/tmp
        """

    def chroot(self, environment: dict[str, str], cwd: str, command: str, user: str = "") -> str:
        told = " ".join(shlex.quote(f"{name}={value}") for name, value in environment.items())
        inner = f"cd {cwd} && {command}"
        drop = f"setpriv --reuid {user} --regid {user} --clear-groups --no-new-privs --bounding-set=-all" if user else ""
        return f"env -i {told} chroot {self.root} {drop} /bin/sh -c {shlex.quote(inner)}"


def in_namespace(script: str, timeout: float) -> str:
    """Run a script as root with mounts that nobody else sees; its output. Raises with the output if it fails."""
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-euo", "pipefail", "-c", script],
        capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def build(file: Dockerfile, target: str, overlay: Overlay, others: dict[str, Overlay], arguments: dict[str, str]) -> str:
    """Shell commands that do what the target's instructions say, as they stand."""
    lines, cwd = [overlay.mount("/")], "/"
    environment = file.environment(target) | arguments
    for kind, what in file.instructions(target):
        if kind == "WORKDIR":
            cwd = what
            lines.append(f"mkdir -p {overlay.root}{cwd}")
        elif kind == "RUN":
            lines.append(overlay.chroot(environment, cwd, what))
        elif kind == "COPY" and what.startswith("--from="):
            stage, source, where = what.removeprefix("--from=").split()
            lines += [f"mkdir -p {overlay.root}{where}", f"mount --bind {others[stage].root}{source} {overlay.root}{where}"]
        elif kind == "COPY":
            *sources, where = what.split()
            for source in sources:
                lines.append(f"(cd {ROOT} && tar -c --null -T {overlay.directory}/context) | tar -x -C {overlay.root}{cwd}/{where}"
                             if source == "." else f"cp {ROOT}/{source} {overlay.root}{cwd}/{where}")  # fmt: skip
    return "\n".join(lines)


def context() -> list[str]:
    """The files that `COPY .` copies, by the allow-list beside the Dockerfile."""
    rules = (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines()
    wanted = [rule[1:] for rule in rules if rule.startswith("!")]
    found = [path for name in wanted for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))]
    return sorted(
        path.relative_to(ROOT).as_posix() for path in found
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    )  # fmt: skip
