"""The inside of the sandbox (`sandbox`): takes away what a program must not have, then runs it.

Run as a script by an isolated interpreter (`python -I`), in an empty folder, with the standard library alone:
`sandbox_child.py REQUEST`, a JSON file that is removed before the program starts. Prints one JSON line.

Three layers, each as far as the system permits: limits on resources; namespaces (Linux) in which there is no
network, no other process, and nothing to write to but a small memory disk; an audit hook that refuses, in
Python, what the namespaces refuse in the kernel, and all there is where they are not permitted.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from typing import Any

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_PRIVATE, MS_REC, MS_NOSUID, MS_NODEV = 1 << 18, 0x4000, 2, 4
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, CAPABILITY_VERSION = 1, 38, 0x20080522

REFUSED = (
    "socket.", "subprocess.", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system",
    "os.kill", "os.killpg", "pty.", "ctypes.", "signal.pthread_kill", "urllib.", "webbrowser.",
    "sys.addaudithook", "cpython.run_",
)  # fmt: skip
"""Beginnings of the names of audit events (PEP 578) that end in a PermissionError."""
CHANGES = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink",
    "os.truncate", "os.utime", "os.setxattr", "shutil.",
)  # fmt: skip
"""Events that change the path they name; refused outside the folder."""


class Libc:
    """System calls that Python 3.11 has no functions for."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL(None, use_errno=True)

    def __call__(self, name: str, *arguments: Any) -> None:
        if getattr(self.lib, name)(*arguments) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{name}: {os.strerror(number)}")


def enter_namespaces(libc: Libc) -> bool:
    """Give this process's next child a world of its own; False where the system does not permit it."""
    uid, gid = os.getuid(), os.getgid()
    try:
        libc("unshare", NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC)
    except (OSError, AttributeError):
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def only_this_folder(libc: Libc, disk_bytes: int) -> bool:
    """In a mount namespace: everything read-only but a memory disk where this folder was."""

    class MountAttr(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]

    folder = os.getcwd().encode()
    attributes = MountAttr(ATTR_RDONLY, 0, 0, 0)
    try:
        libc("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        libc(
            "syscall", MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE,
            ctypes.byref(attributes), ctypes.sizeof(attributes),
        )  # fmt: skip
        options = f"size={disk_bytes},mode=700".encode()
        libc("mount", b"tmpfs", folder, b"tmpfs", MS_NOSUID | MS_NODEV, options)
    except OSError:
        return False
    os.chdir(folder)
    return True


def give_up_privileges(libc: Libc) -> None:
    """No capability is left, and no program that is started could get one."""
    libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    libc("capset", header, (ctypes.c_uint32 * 6)())


def limit(memory_bytes: int, disk_bytes: int, seconds: float) -> None:
    """Hard limits. A system that does not know one of them is left with the others."""
    wanted = {
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_FSIZE": disk_bytes,
        "RLIMIT_CPU": int(seconds) + 1,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,  # no further process or thread; root is exempt
        "RLIMIT_NOFILE": 64,
    }
    for name, value in wanted.items():
        try:
            number = getattr(resource, name)
            hard = resource.getrlimit(number)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(number, (value, value))
        except (AttributeError, ValueError, OSError):
            continue


def refuse_in_python(folder: str) -> None:
    """The audit hook: no sockets, no processes, no foreign code, no change outside the folder."""
    inside = os.path.join(os.path.realpath(folder), "")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def within(path: Any) -> bool:
        if isinstance(path, int):
            return True
        return os.path.join(os.path.realpath(os.fsdecode(path)), "").startswith(inside)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & writing and not within(path):
                raise PermissionError(f"writing to {path!r} is not permitted here")
        elif event.startswith(CHANGES):
            if not all(within(p) for p in arguments if isinstance(p, str | bytes | os.PathLike)):
                raise PermissionError(f"{event} outside this folder is not permitted here")
        elif event.startswith(REFUSED):
            raise PermissionError(f"{event} is not permitted here")

    sys.addaudithook(hook)


def run(code: str) -> str:
    """Run the program; the reason why it failed, or nothing."""
    try:
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
    except MemoryError:
        return "MemoryError"
    except BaseException as e:  # SystemExit and KeyboardInterrupt are failures of the program as well
        last = traceback.extract_tb(e.__traceback__)[-1:]
        where = f" (line {last[0].lineno})" if last and last[0].filename == "<program>" else ""
        return f"{type(e).__name__}: {e}".splitlines()[0][:200] + where
    return ""


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    os.remove(sys.argv[1])
    libc = Libc() if sys.platform == "linux" else None
    apart = libc is not None and enter_namespaces(libc)
    if apart and (child := os.fork()):  # the first process of the new namespace: with it all others end
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)
    files = False
    if libc is not None:
        libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        files = apart and only_this_folder(libc, request["disk_bytes"])
        give_up_privileges(libc)
    answer = os.fdopen(os.dup(1), "w")
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        os.dup2(os.open(os.devnull, mode), number)
    limit(request["memory_bytes"], request["disk_bytes"], request["seconds"])
    refuse_in_python(os.getcwd())
    reason = run(request["code"])
    answer.write(json.dumps({"key": request["key"], "reason": reason, "network": apart, "files": files}))
    answer.flush()
    os._exit(0)  # not through the interpreter's end: a program may have hooked that


if __name__ == "__main__":
    main()
