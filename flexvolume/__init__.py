"""FlexVolume's calls: the volumes, claims and hand-offs that CSI has, for clusters that still use FlexVolume.

Protocol: Kubernetes' pkg/volume/flexvolume, as a kubelet 1.36 was seen to use it.
"""

from flexvolume.calls import Driver, Reply, Status

__all__ = ["Driver", "Reply", "Status"]
