"""Keys and certificates of a cluster, and the kubeconfig files that hold them."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import yaml

from tests.cluster.machines import Broken


def _openssl(*words: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise Broken(f"openssl {' '.join(map(str, words))}: {done.stderr}")


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Certificates:
    """Files in one directory, made when first asked for: `<name>.crt`, `<name>.key`, `<name>.kubeconfig`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.authority = directory / "ca.crt"
        if not self.authority.exists():
            _openssl("req", "-x509", *_NEW_KEY, "-days", "3650", "-subj", "/CN=cluster", "-keyout", directory / "ca.key",
                     "-out", self.authority)  # fmt: skip

    @property
    def service_accounts(self) -> Path:
        """The key that signs the tokens of service accounts."""
        path = self.directory / "service-accounts.key"
        if not path.exists():
            _openssl("ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", path)
        return path

    def pair(self, name: str, subject: str, names: str = "") -> tuple[Path, Path]:
        """A certificate and its key. `names` are a server's: `DNS:a,IP:10.0.0.1`."""
        certificate, key, request = (self.directory / f"{name}.{kind}" for kind in ("crt", "key", "csr"))
        if not certificate.exists():
            extensions = self.directory / f"{name}.extensions"
            extensions.write_text(
                "extendedKeyUsage=serverAuth,clientAuth\n" + (f"subjectAltName={names}\n" if names else "")
            )
            _openssl("req", *_NEW_KEY, "-subj", subject, "-keyout", key, "-out", request)
            _openssl("x509", "-req", "-in", request, "-CA", self.authority, "-CAkey", self.directory / "ca.key", "-days", "3650",
                     "-CAcreateserial", "-extfile", extensions, "-out", certificate)  # fmt: skip
        return certificate, key

    def kubeconfig(self, name: str, subject: str, server: str) -> Path:
        """How one client reaches the API server; the certificates are in the file itself, so that it can be handed on."""
        certificate, key = self.pair(name, subject)
        path = self.directory / f"{name}.kubeconfig"
        cluster = {"server": server, "certificate-authority-data": _encoded(self.authority)}
        user = {"client-certificate-data": _encoded(certificate), "client-key-data": _encoded(key)}
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "cluster", "cluster": cluster}],
                    "users": [{"name": name, "user": user}],
                    "contexts": [{"name": "cluster", "context": {"cluster": "cluster", "user": name}}],
                    "current-context": "cluster",
                }
            )
        )
        return path


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
