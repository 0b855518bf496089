"""`runvol doctor` for NRI, by which guests mount NFS themselves: is it on, at which socket, is the plugin there?"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from guestmount import guest_kernel, kata_config, registration
from guestmount.errors import Refused
from guestmount.runtimes import Handler, in_root
from runvol import assembly, doctor_proxy_plugin
from runvol.config import Config
from runvol.diagnosis import Diagnosis, broken, good, warning

_PLUGIN, _SUBJECT = "io.containerd.nri.v1.nri", "NRI"
# containerd's own.
_SOCKET = "/var/run/nri/nri.sock"


def examine(config: Config, handlers: Iterable[Handler]) -> Iterator[Diagnosis]:
    """Only where a handler's guests could use it."""
    if "nfs" not in config.words("volumes.backends") or not any(_can(config, one) for one in handlers):
        return
    taken, root = assembly.places(config).taken(), config.text("paths.host_root")
    try:
        version, document = doctor_proxy_plugin.document(taken, root)
    except Refused:
        return  # which is told where the snapshotter is looked for
    table = document.get("plugins", {}).get(_PLUGIN, {})
    # Off before containerd 2.0, unless it is switched on.
    if bool(table.get("disable", not version.merges)):
        yield broken("containerd.nri-disabled", _SUBJECT, f"is switched off in {taken.config}: guests cannot mount NFS "
                     "themselves", f'set `disable = false` in [plugins."{_PLUGIN}"] of {taken.config}, then restart '
                     "containerd")  # fmt: skip
        return
    said, wanted = str(table.get("socket_path") or _SOCKET), config.text("nri.socket")
    if os.path.realpath(in_root(said, root)) != os.path.realpath(in_root(wanted, root)):
        yield broken("containerd.nri-socket-elsewhere", _SUBJECT, f"listens at {said} ({taken.config}), and runvol "
                     f"asks at {wanted}", f'`nri.socket = "{said}"`')  # fmt: skip
    elif not os.path.exists(in_root(said, root)):
        yield warning("containerd.nri-socket-missing", _SUBJECT, f"is on in {taken.config}, and {said} is not there")
    elif not registration.is_alive(config.text("paths.run_dir")):
        yield warning("containerd.nri-not-registered", _SUBJECT, "no plugin of runvol's is registered: guests mount no "
                      "NFS themselves")  # fmt: skip
    else:
        yield good("containerd.nri", _SUBJECT, f"is on at {said}, and `runvol nri` is registered")


def _can(config: Config, handler: Handler) -> bool:
    kata = kata_config.read(handler, root=assembly.kata_root(config)) if handler.is_sandbox else None
    if kata is None or not kata.kernel:
        return False
    return any(guest_kernel.missing(kata.kernel, version) == [] for version in guest_kernel.NEEDED)
