"""How much of the machine others used while a side was measured. Linux only; elsewhere everything counts as quiet."""

import os
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def processes() -> dict[int, tuple[int, float, str]]:
    """Of every process: its parent, its processor seconds so far, and its command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # ended in between
            continue
        found[int(folder.name)] = (int(fields[1]), (int(fields[11]) + int(fields[12])) / TICK, command)
    return found


def foreign_seconds(before: dict, after: dict, mark: str) -> float:
    """Processor seconds between two looks by processes that are neither ours nor have `mark` in their command.

    Ours are this process and its descendants; the mark finds servers that a peer started and that left the family.
    """
    ours = {os.getpid()}
    while more := {pid for pid, (parent, *_) in after.items() if parent in ours} - ours:
        ours |= more
    return sum(
        seconds - before.get(pid, (0, 0.0, ""))[1]
        for pid, (_, seconds, command) in after.items()
        if pid not in ours and mark not in command
    )
