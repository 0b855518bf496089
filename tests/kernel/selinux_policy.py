"""A policy of SELinux that decides nothing and knows the labels of the tests, by Debian's `checkpolicy`.

The kernel that it is given to stays permissive. The names and numbers of the initial labels are the kernel's own
(security/selinux/include/initial_sid_to_string.h).
"""

from __future__ import annotations

import subprocess
from pathlib import Path

# What a container's files are labelled with, and two pods' labels.
TYPE = "container_file_t"
ONE, OTHER = (f"system_u:object_r:{TYPE}:s0:{pair}" for pair in ("c10,c20", "c30,c40"))
_INITIAL = (
    "kernel", "security", "unlabeled", "fs", "file", "file_labels", "init", "any_socket", "port", "netif", "netmsg",
    "node", "igmp_packet", "icmp_socket", "tcp_socket", "sysctl_modprobe", "sysctl", "sysctl_fs", "sysctl_kernel",
    "sysctl_net", "sysctl_net_unix", "sysctl_vm", "sysctl_dev", "kmod", "policy", "scmp_packet", "devnull",
)  # fmt: skip
_PERMISSIONS = {"process": "transition dyntransition", "filesystem": "mount", "file": "read", "dir": "read"}
_PROCESS, _OBJECT = "system_u:base_r:base_t:s0", "system_u:object_r:base_t:s0"


def _text() -> str:
    labelled = {name: _PROCESS if name in ("kernel", "init") else _OBJECT for name in _INITIAL}
    lines = [
        *(f"class {name}" for name in _PERMISSIONS),
        *(f"sid {name}" for name in _INITIAL),
        *(f"class {name} {{ {permissions} }}" for name, permissions in _PERMISSIONS.items()),
        "sensitivity s0;",
        "dominance { s0 }",
        *(f"category c{number};" for number in range(1024)),
        "level s0:c0.c1023;",
        "mlsconstrain file { read } ( l1 dom l2 or t1 == base_t );",
        "type base_t;",
        f"type {TYPE};",
        "role base_r;",
        "role base_r types { base_t };",
        "allow base_t base_t:process { transition dyntransition };",
        "user system_u roles { base_r } level s0 range s0 - s0:c0.c1023;",
        *(f"sid {name} {label}" for name, label in labelled.items()),
        *(f"fs_use_xattr {fstype} {_OBJECT};" for fstype in ("ext4", "xfs")),
        f"fs_use_trans tmpfs {_OBJECT};",
        *(f"genfscon {fstype} / {_OBJECT}" for fstype in ("proc", "hostfs", "nfs", "nfs4")),
    ]
    return "\n".join(lines) + "\n"


def compiled(directory: Path) -> Path:
    """The policy as the kernel reads it, in a file of its own."""
    source, policy = directory / "policy.conf", directory / "policy.bin"
    source.write_text(_text())
    words = ["checkpolicy", "-M", "-U", "allow", "-o", str(policy), str(source)]
    subprocess.run(words, check=True, capture_output=True)
    return policy
