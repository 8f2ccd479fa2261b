"""What the pre-flight check is asked to check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from colossal_llama.utils.arguments import number, positive_int
from colossal_llama.utils.settings import flag

DEFAULT_MASTER_PORT = 29500


@dataclass(frozen=True)
class HostSettings:
    """The hosts of a run, and how they reach each other."""

    hostfile: Path | None = flag(
        None, "file with one host name per line; this machine alone when not given", type=Path
    )
    nproc_per_node: int | None = flag(None, "processes on each host; not checked without", type=positive_int)
    master_port: int = flag(DEFAULT_MASTER_PORT, "port on the first host", type=number(int, 1, 65535))
    ssh_port: int | None = flag(
        None, "port of ssh (default: as ssh is configured)", type=number(int, 1, 65535)
    )
    timeout: int = flag(20, "seconds that ssh may take to reach a host", type=positive_int)
