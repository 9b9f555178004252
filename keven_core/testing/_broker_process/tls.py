"""A certificate authority for one test run, made with the Java runtime's `keytool`: nothing else to install."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ServerCertificate", "ThrowAwayCa"]

_PASSWORD = "throw-away"  # protects nothing: the keys live as long as a test run and sign for 127.0.0.1 only
# keytool runs for half a second; it need not compile itself well.
_JVM = ["-J-XX:TieredStopAtLevel=1", "-J-XX:+UseSerialGC", "-J-Xmx64m"]
_KEY = ["-keyalg", "EC", "-groupname", "secp256r1"]


@dataclass(frozen=True)
class ServerCertificate:
    """Key and certificate of a broker, as Java reads them.

    Attributes:
        keystore: PKCS12 file with the key and its certificate chain.
        truststore: PKCS12 file with the authority that signs clients' certificates.
        password: of both files.
    """

    keystore: Path
    truststore: Path
    password: str


class ThrowAwayCa:
    """A certificate authority that signs for one test run. Blocks some 0.5 s for each key it makes.

    Not thread-safe.

    Attributes:
        ca_pem: its certificate, for a client's `ssl.ca.location`.
        password: of every key store it writes.

    Args:
        folder: where its files go; created if need be.
        keytool: path of the program.
    """

    def __init__(self, folder: Path, keytool: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._keytool = keytool
        self.password = _PASSWORD
        self.ca_pem = folder / "ca.pem"
        self._store = folder / "ca.p12"
        self._truststore = folder / "trust.p12"
        self._run(
            "-genkeypair", "-alias", "ca", "-dname", "CN=keven-core throw-away CA", *_KEY,
            "-ext", "bc:critical=ca:true", "-validity", "30", store=self._store,
        )  # fmt: skip
        self._run("-exportcert", "-rfc", "-alias", "ca", "-file", str(self.ca_pem), store=self._store)
        self._run("-importcert", "-noprompt", "-alias", "ca", "-file", str(self.ca_pem), store=self._truststore)

    def server(self, hosts: Sequence[str] = ("127.0.0.1", "localhost"), *, expired: bool = False) -> ServerCertificate:
        """Make a broker's key and certificate.

        Args:
            hosts: names and IPv4 addresses it is good for (subject alternative names).
            expired: True for one whose time is over.
        """
        keystore = self.issue("expired" if expired else "server-" + "-".join(hosts), hosts=hosts, expired=expired)
        return ServerCertificate(keystore, self._truststore, self.password)

    def issue(self, name: str, *, hosts: Sequence[str] = (), expired: bool = False) -> Path:
        """Make a key with a signed certificate and return it as a PKCS12 file (`password` opens it).

        librdkafka takes it for mutual TLS: `ssl.keystore.location`, `ssl.keystore.password`.

        Args:
            name: the certificate's common name; for a client the broker sees the principal `User:CN=<name>`.
            hosts: subject alternative names; empty (default) for a client.
            expired: True for a certificate whose time is over.
        """
        keystore = self._folder / f"{name}.p12"
        if keystore.exists():
            return keystore
        request, signed = self._folder / f"{name}.csr", self._folder / f"{name}.pem"
        self._run("-genkeypair", "-alias", "key", "-dname", f"CN={name}", *_KEY, "-validity", "30", store=keystore)
        self._run("-certreq", "-alias", "key", "-file", str(request), store=keystore)
        names = ",".join(("ip:" if host.replace(".", "").isdigit() else "dns:") + host for host in hosts)
        times = ["-startdate", "-10d", "-validity", "5"] if expired else ["-validity", "30"]
        self._run(
            "-gencert", "-rfc", "-alias", "ca", "-infile", str(request), "-outfile", str(signed), *times,
            *(["-ext", f"san={names}"] if names else []), store=self._store,
        )  # fmt: skip
        # A key's reply is accepted only in a store that already knows the authority.
        self._run("-importcert", "-noprompt", "-alias", "ca", "-file", str(self.ca_pem), store=keystore)
        self._run("-importcert", "-noprompt", "-alias", "key", "-file", str(signed), store=keystore)
        return keystore

    def _run(self, *arguments: str, store: Path) -> None:
        command = [self._keytool, *_JVM, *arguments, "-keystore", str(store), "-storetype", "PKCS12"]
        answer = subprocess.run([*command, "-storepass", _PASSWORD], capture_output=True, text=True, timeout=60)
        if answer.returncode != 0:
            raise RuntimeError(f"keytool {arguments[0]} failed: {(answer.stdout + answer.stderr).strip()}")
