"""containerd's snapshots service: container root filesystems as thin devices of device-mapper.

Knows `blockdev` and nothing of volumes, pods or hand-offs.
"""
