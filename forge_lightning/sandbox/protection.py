"""What the kernel can take from a process: files, system calls, capabilities, memory. Standard library only.

Landlock and seccomp through ctypes, so that an ordinary user needs neither root, nor a container, nor a compiler.
"""

import ctypes
import errno
import os
import resource
import struct
import sys
from collections.abc import Iterable

_NO_NEW_PRIVILEGES, _SECCOMP_MODE_FILTER, _SET_SECCOMP, _PARENT_DEATH_SIGNAL, _SET_DUMPABLE = 38, 2, 22, 1, 4

# name: (x86_64, aarch64); None where the architecture has no such call.
SYSTEM_CALLS: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "prlimit64": (302, 261), "setrlimit": (160, 164),
    "move_pages": (279, 239), "migrate_pages": (256, 238), "setpgid": (109, 154), "setsid": (112, 157),
    # the network, and memory that outlives the process
    "socket": (41, 198), "socketpair": (53, 199), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "io_setup": (206, 0), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # what a set of file rules does not cover
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "truncate": (76, 45), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466), "getxattr": (191, 8),
    "lgetxattr": (192, 9), "fgetxattr": (193, 10), "getxattrat": (464, 464), "listxattr": (194, 11),
    "llistxattr": (195, 12), "flistxattr": (196, 13), "listxattrat": (465, 465), "file_getattr": (468, 468),
    "file_setattr": (469, 469), "mknod": (133, None),
    "mknodat": (259, 33), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "inotify_init": (253, None), "inotify_init1": (294, 26), "fanotify_init": (300, 262), "flock": (73, 32),
    # the machine
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "acct": (163, 89), "syslog": (103, 116), "sethostname": (170, 161), "setdomainname": (171, 162),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "iopl": (172, None), "ioperm": (173, None), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    # the kernel's larger surfaces
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "seccomp": (317, 277), "personality": (135, 92),
    # some of what they do: see `_DENIED_ARGUMENTS`
    "fcntl": (72, 25), "ioctl": (16, 29), "prctl": (157, 167),
}  # fmt: skip
"""What a program is denied: `EPERM`, or `ENOSYS` for ``clone3``, so that libraries fall back to ``clone``."""

WORKERS_OWN = ("fork", "vfork", "clone", "clone3", "kill", "tgkill", "setsid", "setrlimit", "prlimit64", "prctl")
"""System calls among them that a worker needs to start, limit and end programs."""

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_TO_SELF_ONLY = ("kill", "tgkill")  # `abort` signals the process itself
_DENIED_ARGUMENTS = {  # name: (which argument, values)
    # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals by way of a pipe. Locks, leases and notices on what others read too.
    "fcntl": (1, (8, 10, 15, 6, 7, 37, 38, 1024, 1026)),
    "prctl": (0, (_PARENT_DEATH_SIGNAL, _SET_DUMPABLE, 0x59616D61)),  # to outlive the worker; to be traced
}

_ALLOWED_ARGUMENTS = {
    "ioctl": (
        1,
        (0x5401, 0x5413, 0x541B, 0x5421, 0x5451, 0x5450),
    ),  # what Python asks of a descriptor, changing no file
}

_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the argument's low half


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


_found: list[ctypes.CDLL] = []


def _libc() -> ctypes.CDLL:
    if not _found:
        _found.append(ctypes.CDLL(None, use_errno=True))
    return _found[0]


def _machine() -> str:
    return os.uname().machine if hasattr(os, "uname") else ""


def seccomp_filter(machine: str, pid: int, names: Iterable[str]) -> bytes:
    """A BPF program that denies some of `SYSTEM_CALLS`; signals to ``pid`` itself stay allowed.

    Raises:
        KeyError: If the machine's numbers are not known.
    """
    column, architecture = _ARCHITECTURES[machine]
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER),
    ]  # fmt: skip
    if machine == "x86_64":  # the same calls under other numbers
        code += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for name in names:
        number = SYSTEM_CALLS[name][column]
        if number is None:
            continue
        denied = (_RETURN, 0, 0, _ERROR | (errno.ENOSYS if name == "clone3" else errno.EPERM))
        if name in _DENIED_ARGUMENTS:
            place, values = _DENIED_ARGUMENTS[name]
            tests = [step for value in values for step in ((_EQUAL, 0, 1, value), denied)]
            code += [(_EQUAL, 0, len(tests) + 2, number), (_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * place), *tests]
            code.append((_LOAD, 0, 0, _NUMBER))
            continue
        if name in _ALLOWED_ARGUMENTS or name in _TO_SELF_ONLY:
            place, values = _ALLOWED_ARGUMENTS.get(name, (0, (pid,)))
            tests = [(_EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
            code += [(_EQUAL, 0, len(tests) + 3, number), (_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * place), *tests, denied]
            code.append((_LOAD, 0, 0, _NUMBER))
            continue
        code += [(_EQUAL, 0, 1, number), denied]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def apply_seccomp(names: Iterable[str] = tuple(SYSTEM_CALLS)) -> None:
    """Deny these of `SYSTEM_CALLS` to this process and its children from here on.

    The kernel translates a filter when it is applied: a worker applies the long part once, its children the short rest.

    Raises:
        OSError: If the kernel refuses.
        KeyError: If the machine's numbers are not known.
    """
    raw = seccomp_filter(_machine(), os.getpid(), names)
    buffer = ctypes.create_string_buffer(raw, len(raw))
    program = _FilterProgram(len(raw) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    libc = _libc()
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(
        _SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp")


def readable_folders() -> list[str]:
    """What a Python program must read: the interpreter's libraries."""
    prefix = sys.base_prefix
    wanted = ["/usr/lib", "/lib", "/lib64", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    wanted += [f"{prefix}/lib", f"{prefix}/lib64", os.path.dirname(os.__file__)]
    return [folder for folder in dict.fromkeys(os.path.realpath(path) for path in wanted) if os.path.exists(folder)]


def apply_landlock(readable: Iterable[str]) -> int:
    """Allow this process and its children to read these folders, and no other file, and nothing to be written.

    Returns:
        Version of the kernel's interface; 0 where it has none, and nothing was done.

    Raises:
        OSError: If the kernel has it and refuses.
    """
    if not sys.platform.startswith("linux"):
        return 0
    version = int(_libc().syscall(444, None, 0, 1))
    if version < 1:
        return 0
    handled = (1 << 13) - 1
    for least, right in ((2, 1 << 13), (3, 1 << 14), (5, 1 << 15)):
        handled |= right if version >= least else 0
    _enter_domain(version, handled, 3 if version >= 4 else 0, readable)  # TCP: bind, connect
    return version


def leave_siblings(version: int) -> None:
    """Enter a domain of one's own, which has no part in the pipes, memory and signals of processes outside it.

    Args:
        version: Version of landlock, as `apply_landlock` returned it; 0 does nothing.
    """
    if version:
        _enter_domain(version, 1 << 0, 0, ())  # may not execute a file, which is forbidden already


def _enter_domain(version: int, handled: int, network: int, readable: Iterable[str]) -> None:
    libc = _libc()
    # The last: abstract sockets, and signals to processes outside.
    attributes = struct.pack("QQQ", handled, network, 3 if version >= 6 else 0)
    attributes = attributes[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = libc.syscall(444, attributes, len(attributes), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    try:
        for path in readable:
            rights = 1 << 2 | (1 << 3 if os.path.isdir(path) else 0)  # read a file, read a folder
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                if libc.syscall(445, ruleset, 1, struct.pack("=QI", rights, folder), 0):
                    raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
            finally:
                os.close(folder)
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        if libc.syscall(446, ruleset, 0):
            raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    finally:
        os.close(ruleset)


def drop_capabilities() -> None:
    """Where root runs this, take what root may do beyond others. Files stay root's: see `apply_landlock`."""
    if sys.platform.startswith("linux") and _machine() in _ARCHITECTURES:
        header = struct.pack("Ii", 0x20080522, 0)
        _libc().syscall({"x86_64": 126, "aarch64": 91}[_machine()], header, struct.pack("6I", *[0] * 6))


def hide() -> None:
    """Close what is in ``/proc`` of this process and its children to others of the same user: pipes, memory."""
    if sys.platform.startswith("linux"):
        _libc().prctl(_SET_DUMPABLE, 0, 0, 0, 0)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    if sys.platform.startswith("linux"):
        _libc().prctl(_PARENT_DEATH_SIGNAL, 9, 0, 0, 0)


def limit(memory_bytes: int, cpu_seconds: int) -> None:
    """Bound address space, CPU time and open files; no file may grow, and no core be dumped."""
    for name, value in (
        ("RLIMIT_AS", memory_bytes),
        ("RLIMIT_CPU", cpu_seconds),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_CORE", 0),
    ):
        if hasattr(resource, name):
            kind, hard = getattr(resource, name), resource.getrlimit(getattr(resource, name))[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
