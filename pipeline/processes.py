"""Who a process is, beyond its number: numbers are used again, and mean something in one pid namespace only."""

import os
from pathlib import Path


def process_identity(pid: int) -> str | None:
    """Boot, pid namespace, number and start time of a process of this machine, without slashes; None if it is gone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
        namespace = os.readlink("/proc/self/ns/pid").removeprefix("pid:[").removesuffix("]")
        start_ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
    return f"{boot}-{namespace}-{pid}-{start_ticks}"


def has_ended(identity: str) -> bool:
    """Whether ``identity`` was a process of this boot and pid namespace and runs no more. False if one cannot know."""
    here, parts = process_identity(os.getpid()), identity.split("-")
    if here is None or len(parts) != 4 or here.split("-")[:2] != parts[:2] or not parts[2].isdecimal():
        return False
    return process_identity(int(parts[2])) != identity
